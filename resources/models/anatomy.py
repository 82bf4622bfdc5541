"""Where a model keeps its layers and what may be read or steered there, found by structure.

A decoder's blocks are the module list of the configured length through which the residual stream flows. The
parts of a block are told apart by what a traced forward pass of a few tokens shows: which tensor a norm
receives (a post-norm receives the sub-layer's very output), what is really added to the residual stream
(multipliers included), and which columns of a fused projection the KV cache receives. So no list of
architectures is kept, and a component is offered only where the trace confirms it.

Hooks that use these sites live in `capture` and `steering`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from resources.models.rows import COMPONENTS
from storage.errors import UserError


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden state in a module's output, which may be a tensor, a tuple or list, or a ModelOutput."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    if isinstance(output, Mapping):
        for value in output.values():
            if isinstance(value, torch.Tensor):
                return value
    raise TypeError(f"no hidden state in a module output of type {type(output).__name__}")


def with_first_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """The same output with its hidden state exchanged; containers keep their type."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        rest = output[1:]
        return type(output)(tensor, *rest) if hasattr(output, "_fields") else (tensor, *rest)
    if isinstance(output, list):
        return [tensor, *output[1:]]
    if isinstance(output, Mapping):
        for name, value in output.items():
            if isinstance(value, torch.Tensor):
                if dataclasses.is_dataclass(output) and not isinstance(output, type):
                    return dataclasses.replace(output, **{name: tensor})
                return type(output)({**output, name: tensor})  # type: ignore[call-arg]
    raise TypeError(f"no hidden state in a module output of type {type(output).__name__}")


@dataclass(frozen=True)
class Site:
    """One place of one layer: `module`'s output, times `scale`, restricted to `columns` where a projection is
    fused.

    `scale` is the factor with which the model adds that output to the residual stream.
    """

    module: nn.Module
    width: int
    scale: float = 1.0
    columns: torch.Tensor | None = None

    def read(self, output: Any) -> torch.Tensor:
        """The site's value, [batch, tokens, width]."""
        value = first_tensor(output)
        if self.columns is not None:
            value = value.index_select(-1, self.columns.to(value.device))
        return value if self.scale == 1.0 else value * self.scale

    def write(self, output: Any, value: torch.Tensor) -> Any:
        """The output with the site's value exchanged, so that `read` of it gives `value`."""
        if self.scale != 1.0:
            value = value / self.scale
        if self.columns is not None:
            whole = first_tensor(output)
            value = whole.index_copy(-1, self.columns.to(whole.device), value.to(whole.dtype))
        return with_first_tensor(output, value)


@dataclass
class Anatomy:
    """The blocks of one model and their sites.

    `decoder` is the stack without the language-model head (what capture runs); `absent` says by component why
    some layer does not have it.
    """

    decoder: nn.Module
    layers: list[nn.Module]
    hidden_size: int
    sites: dict[str, list[Site]]
    absent: dict[str, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for name in COMPONENTS if name in self.sites)

    def site(self, component: str, layer: int) -> Site:
        """UserError for an unknown component, one that the architecture lacks, or a layer out of range."""
        self.require(component)
        if not 0 <= layer < len(self.layers):
            raise UserError(
                f"layer {layer} does not exist: the model has n_layers = {len(self.layers)}",
                where=self.architecture,
                remedy=f"Use layers 0 to {len(self.layers) - 1}.",
            )
        return self.sites[component][layer]

    def require(self, component: str) -> None:
        if component not in COMPONENTS:
            raise UserError(
                f"unknown component {component!r}",
                where="component",
                remedy=f"Use one of {', '.join(COMPONENTS)}.",
            )
        if component not in self.sites:
            raise UserError(
                f"{self.architecture} has no {component}: {self.absent.get(component, 'not found')}",
                where="component",
                remedy=f"It has {', '.join(self.components)}.",
            )


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder, also inside a multimodal wrapper."""
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def bare_model(model: Any) -> Any:
    """The transformers model itself: PEFT wraps it, and its adapters stay in place inside."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def cache_argument(module: nn.Module) -> str:
    """The forward argument that takes the KV cache: `cache` from transformers 5.2x on, `past_key_values`
    before.
    """
    names = inspect.signature(module.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def dissect(model: Any) -> Anatomy:
    """Find the anatomy of a loaded causal language model; runs one forward pass over four tokens.

    Raises UserError naming the class where the blocks cannot be told.
    """
    bare = bare_model(model)
    config = text_config(bare)
    architecture = type(bare).__name__
    decoder = bare.get_decoder() if hasattr(bare, "get_decoder") else bare.base_model
    layers = _find_layers(decoder, int(config.num_hidden_layers), architecture)
    hidden = int(config.hidden_size)
    trace = _trace(decoder, layers, int(config.vocab_size))
    for index, layer in enumerate(layers):
        if trace.blocks[index].shape[-1] != hidden:
            raise UserError(
                f"block {index} ({type(layer).__name__}) puts out width {trace.blocks[index].shape[-1]},"
                f" not the hidden size {hidden}",
                where=architecture,
                remedy="This architecture is not a plain decoder; use another model.",
            )
    anatomy = Anatomy(decoder=decoder, layers=layers, hidden_size=hidden, sites={}, architecture=architecture)
    anatomy.sites["residual"] = [Site(layer, hidden) for layer in layers]
    found = [_dissect_block(layer, trace, index, hidden) for index, layer in enumerate(layers)]
    for component in COMPONENTS[1:]:
        sites: list[Site] = []
        for index, (parts, why) in enumerate(found):
            if component not in parts:
                reason = why.get(component, "not found")
                anatomy.absent[component] = f"layer {index} ({type(layers[index]).__name__}): {reason}"
                break
            sites.append(parts[component])
        else:
            anatomy.sites[component] = sites
    return anatomy


def _find_layers(decoder: nn.Module, count: int, architecture: str) -> list[nn.Module]:
    candidates = [
        (name, list(module))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0
    ]
    # a list of experts or of heads inside a block may have the same length: the outermost lists hold the
    # blocks
    depth = min((name.count(".") for name, _ in candidates), default=0)
    outer = [entry for entry in candidates if entry[0].count(".") == depth]
    blocks = [entry for entry in outer if all(_has_parameters(block) for block in entry[1])]
    if len(blocks) > 1:
        blocks = [entry for entry in blocks if _carries_layer_index(entry[1][0])]
    if len(blocks) != 1:
        lists = ", ".join(name for name, _ in outer) or "none"
        raise UserError(
            f"cannot tell the {count} decoder blocks (module lists of that length: {lists})",
            where=architecture,
            remedy="This architecture is not supported; use another model.",
        )
    return blocks[0][1]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _carries_layer_index(block: nn.Module) -> bool:
    return any(hasattr(module, "layer_idx") for module in block.modules())


@dataclass
class _Trace:
    """One traced forward pass.

    `blocks[i]`, `entries[i]`: residual stream after and before; `inputs`, `outputs`: the very tensors of the
    watched modules, to compare by memory; `values_of`: copies of the outputs, for numbers, since a block may
    add in place.
    """

    blocks: list[torch.Tensor]
    entries: list[torch.Tensor]
    inputs: dict[nn.Module, torch.Tensor]
    outputs: dict[nn.Module, torch.Tensor]
    values_of: dict[nn.Module, torch.Tensor]
    keys: list[torch.Tensor | None]
    values: list[torch.Tensor | None]


@contextmanager
def hooks(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks for the time of a with block: removed also after an exception, none left where one
    fails.
    """
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def input_device(decoder: nn.Module) -> torch.device:
    """Where token ids belong: the device of the input embedding, or where accelerate's hook sends them."""
    embedding: Any = decoder.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    hook = getattr(embedding, "_hf_hook", None)
    if device.type == "meta" and hook is not None and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return torch.device(device)


def _trace(decoder: nn.Module, layers: Sequence[nn.Module], vocabulary: int) -> _Trace:
    from transformers import DynamicCache

    blocks: dict[int, torch.Tensor] = {}
    entries: dict[int, torch.Tensor] = {}
    inputs: dict[nn.Module, torch.Tensor] = {}
    outputs: dict[nn.Module, torch.Tensor] = {}
    values_of: dict[nn.Module, torch.Tensor] = {}
    watched: list[nn.Module] = []
    for layer in layers:
        for child in layer.children():
            watched.append(child)
            if hasattr(child, "layer_idx"):
                watched.extend(child.children())

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            outputs[module] = first_tensor(output)
        except TypeError:
            return
        values_of[module] = outputs[module].clone()
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, torch.Tensor):
            inputs[module] = given

    def enter(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entries[index] = (args[0] if args else kwargs["hidden_states"]).clone()

        return record

    def leave(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            blocks[index] = first_tensor(output).clone()

        return record

    cache = DynamicCache(config=decoder.config)  # type: ignore[arg-type]
    ids = torch.tensor([[token % vocabulary for token in (3, 5, 7, 11)]], device=input_device(decoder))
    with ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(remember, with_kwargs=True).remove)
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(enter(index), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave(index)).remove)
        with torch.no_grad():
            decoder(
                input_ids=ids,
                position_ids=torch.arange(4, device=ids.device)[None],
                use_cache=True,
                **{cache_argument(decoder): cache},
            )
    if len(blocks) != len(layers):
        missing = sorted(set(range(len(layers))) - set(blocks))
        raise UserError(f"blocks {missing} did not run", where=type(decoder).__name__)
    keys: list[torch.Tensor | None] = []
    values: list[torch.Tensor | None] = []
    for index in range(len(layers)):
        entry = cache.layers[index] if index < len(cache.layers) else None
        keys.append(getattr(entry, "keys", None))
        values.append(getattr(entry, "values", None))
    return _Trace(
        blocks=[blocks[index] for index in range(len(layers))],
        entries=[entries[index] for index in range(len(layers))],
        inputs=inputs,
        outputs=outputs,
        values_of=values_of,
        keys=keys,
        values=values,
    )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """The same memory: dropout and identity modules pass a tensor on as another Python object."""
    return a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _is_norm(module: nn.Module, hidden: int) -> bool:
    parameters = list(module.parameters())
    return (
        not any(True for _ in module.children())
        and len(parameters) in (1, 2)
        and all(parameter.dim() == 1 and parameter.numel() in (0, hidden) for parameter in parameters)
    ) or "norm" in type(module).__name__.lower()


def _dissect_block(
    block: nn.Module, trace: _Trace, index: int, hidden: int
) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites of one block, and for each component it lacks the reason."""
    parts: dict[str, Site] = {}
    why: dict[str, str] = {}
    children = list(block.children())
    norms = [child for child in children if _is_norm(child, hidden)]
    attention = [child for child in children if hasattr(child, "layer_idx") and child not in norms]
    feed_forward = [
        child
        for child in children
        if child not in norms
        and child not in attention
        and _has_parameters(child)
        and child in trace.outputs
        and trace.outputs[child].shape[-1] == hidden
    ]
    for name, modules in (("attn", attention), ("mlp", feed_forward)):
        if len(modules) != 1 or modules[0] not in trace.outputs:
            kinds = ", ".join(type(module).__name__ for module in modules) or "none"
            why[f"{name}_out"] = why[f"{name}_contribution"] = f"not one sub-layer of this kind but: {kinds}"
            continue
        parts[f"{name}_out"] = Site(modules[0], hidden)
    _find_contributions(parts, why, norms, trace, index, hidden)
    _find_projections(parts, why, attention, trace, index)
    return parts, why


def _find_contributions(
    parts: dict[str, Site],
    why: dict[str, str],
    norms: Sequence[nn.Module],
    trace: _Trace,
    index: int,
    hidden: int,
) -> None:
    added: dict[str, nn.Module] = {}
    for name in ("attn", "mlp"):
        if f"{name}_out" not in parts:
            continue
        module = parts[f"{name}_out"].module
        # the norm that receives the sub-layer's own output is a post-norm, whatever it is called
        post = [norm for norm in norms if _same(trace.inputs.get(norm), trace.outputs[module])]
        added[name] = post[0] if len(post) == 1 else module
    if len(added) < 2:
        for name in added:
            why[f"{name}_contribution"] = "the block has another part whose share cannot be told apart"
        return
    # token 0 is left out: its massive norm would hide the step in rounding
    out = trace.blocks[index][:, 1:]
    step = (out.float() - trace.entries[index][:, 1:].float().to(out.device)).flatten()
    summands = torch.stack(
        [trace.values_of[added[name]][:, 1:].float().flatten().to(step.device) for name in ("attn", "mlp")],
        dim=1,
    )
    # each addition to the residual stream rounds it once; anything structural is off by far more
    allowed = 1e-4 * float(step.norm()) + 4 * torch.finfo(out.dtype).eps * float(out.float().norm())
    scales = torch.ones(2, device=step.device)
    error = float((step - summands @ scales).norm())
    if error > allowed:
        basis = summands.double().cpu()
        target = step.double().cpu()
        scales = torch.linalg.solve(basis.T @ basis, basis.T @ target).to(step)
        error = float((step - summands @ scales).norm())
    if not error <= allowed:
        reason = (
            f"residual out − residual in is not their sum (off by {error:.1e} of {float(step.norm()):.1e})"
        )
        why["attn_contribution"] = why["mlp_contribution"] = reason
        return
    for position, name in enumerate(("attn", "mlp")):
        parts[f"{name}_contribution"] = Site(added[name], hidden, scale=float(scales[position]))


def _find_projections(
    parts: dict[str, Site], why: dict[str, str], attention: Sequence[nn.Module], trace: _Trace, index: int
) -> None:
    if len(attention) != 1:
        why["k_proj"] = why["v_proj"] = "no single attention sub-layer"
        return
    for component, cached in (("k_proj", trace.keys[index]), ("v_proj", trace.values[index])):
        named = getattr(attention[0], component, None)
        if isinstance(named, nn.Module) and named in trace.outputs:
            parts[component] = Site(named, int(trace.outputs[named].shape[-1]))
            continue
        site = _fused_columns(attention[0], cached, trace)
        if site is None:
            why[component] = (
                "the attention has neither such a projection nor a fused one that feeds the cache as is"
            )
        else:
            parts[component] = site


def _fused_columns(attention: nn.Module, cached: torch.Tensor | None, trace: _Trace) -> Site | None:
    """Columns of a fused query-key-value projection, by comparing it with what the cache holds.

    At position 0 rotary embeddings are the identity, so keys can be compared as values can.
    """
    if cached is None or cached.dim() != 4:
        return None
    wanted = cached[0, :, 0, :].flatten().float()
    for child in attention.children():
        output = trace.outputs.get(child)
        if output is None or output.dim() != 3 or output.shape[-1] <= wanted.numel():
            continue
        row = trace.values_of[child][0, 0].float().to(wanted.device)
        distance = (row[None, :] - wanted[:, None]).abs()
        nearest = distance.argmin(dim=1)
        scale = wanted.abs().max().clamp_min(1e-12)
        if (
            float(distance.min(dim=1).values.max() / scale) < 1e-5
            and nearest.unique().numel() == nearest.numel()
        ):
            return Site(child, wanted.numel(), columns=nearest)
    return None
