"""Small pictures for the asset pages and the report: numbers in, PNG bytes (under 100 kB) out.

Belongs here: how a result is drawn. Does not: computing anything, reading or writing files. matplotlib is imported inside
the functions, with the Agg backend and its object interface, so nothing needs a display and threads do not share state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_BYTES = 100_000
POSITIVE, NEGATIVE, NEUTRAL = "#c2410c", "#1d4ed8", "#52525b"


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, ready for `png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def png(drawn: Figure, dpi: int = 110) -> bytes:
    """PNG bytes, at a lower resolution if they would be 100 kB or more; equal input gives equal bytes."""
    while True:
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        if buffer.tell() < LARGEST_BYTES or dpi <= 30:
            return buffer.getvalue()
        dpi = int(dpi * 0.75)


_WORDS = {"val_auc": "held-out AUC", "val_accuracy": "held-out accuracy", "cv_auc": "cross-validated AUC"}


def layer_method_heatmap(
    rows: Sequence[Mapping[str, Any]], metric: str, best: Mapping[str, Any] | None, *, title: str
) -> bytes:
    """`metric` of evaluation rows of one position and component: methods down, layers across; the chosen cell framed."""
    import numpy as np

    layers = sorted({row["layer"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    grid = np.full((len(methods), len(layers)), np.nan)
    for row in rows:
        if row[metric] is not None:
            grid[methods.index(row["method"]), layers.index(row["layer"])] = row[metric]
    drawn = figure(max(5.0, 0.26 * len(layers) + 2.4), 1.3 + 0.42 * len(methods))
    ax = drawn.add_subplot()
    image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=min(0.5, float(np.nanmin(grid))), vmax=1.0)
    if best is not None and best["layer"] in layers and best["method"] in methods:
        from matplotlib.patches import Rectangle

        corner = (layers.index(best["layer"]) - 0.5, methods.index(best["method"]) - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=POSITIVE, linewidth=2.5))
    ax.set_yticks(range(len(methods)), methods)
    _layer_ticks(ax.set_xticks, layers)
    ax.set_xlabel("layer")
    ax.set_title(
        f"{title}: {_WORDS.get(metric, metric.replace('_', ' '))}"
        + (" (framed: chosen on train)" if best else ""),
        fontsize=10,
    )
    drawn.colorbar(image, ax=ax, pad=0.01)
    return png(drawn)


def projection_strip(
    projections: Sequence[Mapping[str, Any]], best: Mapping[str, Any], *, title: str
) -> bytes:
    """Every row's projection on the chosen vector, train and held-out apart, with the train threshold."""
    import numpy as np

    parts = [part for part in ("train", "val") if any(row["part"] == part for row in projections)]
    drawn = figure(6.4, 0.9 + 0.8 * len(parts))
    ax = drawn.add_subplot()
    rng = np.random.default_rng(0)
    for line, part in enumerate(parts):
        for polarity, colour, side in (("positive", POSITIVE, -0.15), ("negative", NEGATIVE, 0.15)):
            values = [r["projection"] for r in projections if r["part"] == part and r["polarity"] == polarity]
            height = line + side + rng.uniform(-0.1, 0.1, len(values))
            ax.plot(
                values,
                height,
                "o",
                color=colour,
                alpha=0.7,
                markersize=4,
                label=polarity if line == 0 else None,
            )
    if best["threshold"] is not None:
        ax.axvline(best["threshold"], color=NEUTRAL, linestyle="--", linewidth=1, label="threshold")
    ax.set_yticks(range(len(parts)), ["held out" if part == "val" else part for part in parts])
    ax.invert_yaxis()
    ax.set_xlabel("projection on the unit vector (activation units)")
    ax.set_title(f"{title}: {best['method']}, layer {best['layer']}", fontsize=10)
    drawn.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
    return png(drawn)


def cosine_heatmap(matrix: Sequence[Sequence[float | None]], names: Sequence[str], *, title: str) -> bytes:
    """A symmetric matrix of cosines, -1 blue to +1 red."""
    return _square(matrix, names, title, cmap="RdBu_r", low=-1.0, high=1.0)


def auc_heatmap(matrix: Sequence[Sequence[float | None]], names: Sequence[str], *, title: str) -> bytes:
    """A matrix of AUCs around 0.5."""
    return _square(matrix, names, title, cmap="RdBu_r", low=0.0, high=1.0)


def _square(
    matrix: Sequence[Sequence[float | None]],
    names: Sequence[str],
    title: str,
    *,
    cmap: str,
    low: float,
    high: float,
) -> bytes:
    import numpy as np

    grid = np.array([[np.nan if value is None else value for value in line] for line in matrix], dtype=float)
    size = min(9.0, 2.6 + 0.3 * len(names))
    drawn = figure(size + 0.6, size)
    ax = drawn.add_subplot()
    image = ax.imshow(grid, cmap=cmap, vmin=low, vmax=high)
    every = 1 if len(names) <= 24 else -(-len(names) // 16)
    places = list(range(0, len(names), every))
    ax.set_xticks(places, [names[i] for i in places], rotation=90, fontsize=7)
    ax.set_yticks(places, [names[i] for i in places], fontsize=7)
    if len(names) <= 10:
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if np.isfinite(value):
                    dark = abs(value - (low + high) / 2) > 0.35 * (high - low)
                    colour = "white" if dark else "black"
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_title(title, fontsize=10)
    drawn.colorbar(image, ax=ax, pad=0.02, shrink=0.8)
    return png(drawn)


def _layer_ticks(set_ticks: Any, layers: Sequence[int]) -> None:
    every = max(1, len(layers) // 20)
    set_ticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=7)


def dose_response(
    points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], *, threshold: float, title: str
) -> bytes:
    """Change of the trait score and coherence over the relative dose.

    Thin lines: every candidate on the search half; thick: the chosen one, with its 95 % interval; diamond: the chosen dose on
    the report half; grey crosses: norm-matched random directions there; hollow and faded: a dose that the report half found
    incoherent, so that a smaller one is reported. Below: coherence with its threshold.
    """
    drawn = figure(6.4, 5.0)
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        if point["half"] == "search" and point["kind"] == "vector" and point["change"] is not None:
            lines.setdefault(point["name"], []).append(point)
    best = (chosen.get("best_method"), chosen.get("best_layer"))
    for line in lines.values():
        line = sorted(line, key=lambda p: p["dose"])
        mine = (line[0]["method"], line[0]["layer"]) == best
        doses = [0.0] + [p["dose"] for p in line]
        style: dict[str, Any] = (
            {"color": POSITIVE, "linewidth": 2, "zorder": 3}
            if mine
            else {
                "color": NEUTRAL,
                "linewidth": 0.8,
                "alpha": 0.45,
            }
        )
        label = f"{line[0]['method']}, layer {line[0]['layer']} (search half)" if mine else None
        upper.plot(doses, [0.0] + [p["change"] for p in line], marker="o", markersize=3, label=label, **style)
        judged = [p for p in line if p["coherence"] is not None]
        lower.plot(
            [p["dose"] for p in judged], [p["coherence"] for p in judged], marker="o", markersize=3, **style
        )
        if mine and all(p["low"] is not None for p in line):
            low, high = [0.0] + [p["low"] for p in line], [0.0] + [p["high"] for p in line]
            upper.fill_between(doses, low, high, color=POSITIVE, alpha=0.12, linewidth=0)
    # a dose that fresh questions found incoherent was measured before the one that is reported
    dose = chosen.get("best_dose")
    labels = {
        ("random", True): "random directions (report half)",
        ("vector", True): "chosen dose (report half)",
        ("vector", False): "first choice, incoherent on the report half",
    }
    for point in points:
        if point["half"] != "report" or point["change"] is None or point["kind"] not in ("random", "vector"):
            continue
        final = dose is None or abs(point["dose"] - abs(dose)) < 1e-9
        label = labels.pop((point["kind"], final), None)
        fade = 1.0 if final else 0.35
        if point["kind"] == "random":
            upper.plot(
                point["dose"], point["change"], "x", color=NEUTRAL, markersize=6, alpha=fade, label=label,
                zorder=4,
            )  # fmt: skip
            continue
        bars = None
        if point["low"] is not None:
            bars = [[point["change"] - point["low"]], [point["high"] - point["change"]]]
        filled = {} if final else {"markerfacecolor": "white"}
        upper.errorbar(
            point["dose"], point["change"], yerr=bars, fmt="D", color=NEGATIVE, alpha=fade, capsize=3,
            zorder=5, label=label, **filled,
        )  # fmt: skip
        if point["coherence"] is not None:
            lower.plot(point["dose"], point["coherence"], "D", color=NEGATIVE, alpha=fade, zorder=5, **filled)
    if chosen.get("prompting_change") is not None:
        upper.axhline(
            chosen["prompting_change"], color=NEGATIVE, linestyle=":", linewidth=1, label="system prompt"
        )
    upper.axhline(0, color=NEUTRAL, linewidth=0.8)
    lower.axhline(threshold, color=NEUTRAL, linestyle="--", linewidth=0.8)
    upper.set_ylabel("change of the trait score")
    lower.set_ylabel("coherence")
    lower.set_ylim(0, 102)
    lower.set_xlabel("relative dose ‖added‖ ÷ median ‖h‖")
    verdict = "validated" if chosen.get("validated") else "not validated"
    upper.set_title(f"{title}: {verdict}", fontsize=10)
    upper.legend(fontsize=7, frameon=False)
    return png(drawn)


def layer_dose_heatmap(
    points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], *, threshold: float, title: str
) -> bytes:
    """Change of the trait score on the search half: candidates down (by layer), doses across; a cross where coherence lies
    below the threshold, a frame around the chosen setting."""
    import numpy as np
    from matplotlib.patches import Rectangle

    searched = [
        p for p in points if p["half"] == "search" and p["kind"] == "vector" and p["change"] is not None
    ]
    rows = sorted({(p["layer"], p["method"], p["name"]) for p in searched})
    doses = sorted({round(p["dose"], 4) for p in searched})
    drawn = figure(max(4.6, 0.62 * len(doses) + 2.6), max(2.0, 0.34 * len(rows) + 1.3))
    ax = drawn.add_subplot()
    if not searched:
        ax.text(0.5, 0.5, "nothing was scored", ha="center", va="center")
        return png(drawn)
    grid = np.full((len(rows), len(doses)), np.nan)
    for p in searched:
        i, j = rows.index((p["layer"], p["method"], p["name"])), doses.index(round(p["dose"], 4))
        grid[i, j] = p["change"]
        if p["coherence"] is None or p["coherence"] < threshold:
            ax.plot(j, i, "x", color="black", markersize=9)
        else:
            ax.text(j, i, f"{p['change']:+.0f}", ha="center", va="center", fontsize=7)
    reach = max(10.0, float(np.nanmax(np.abs(grid))))
    image = ax.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
    dose = abs(chosen["best_dose"]) if chosen.get("best_dose") is not None else None
    for i, (layer, method, _) in enumerate(rows):
        if (method, layer) == (chosen.get("best_method"), chosen.get("best_layer")) and dose is not None:
            j = min(range(len(doses)), key=lambda k: abs(doses[k] - dose))
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=POSITIVE, linewidth=2.5))
    ax.set_yticks(range(len(rows)), [f"layer {layer}, {method}" for layer, method, _ in rows], fontsize=7)
    ax.set_xticks(range(len(doses)), [f"{d:g}" for d in doses], fontsize=7)
    ax.set_xlabel("relative dose (× incoherent, framed: chosen)")
    ax.set_title(f"{title}: change on the search half", fontsize=10)
    drawn.colorbar(image, ax=ax, pad=0.02)
    return png(drawn)


def steering_changes(rows: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """All traits: reported change with its interval, beside random directions and the system prompt."""
    drawn = figure(6.4, 1.4 + 0.36 * len(rows))
    ax = drawn.add_subplot()
    for i, row in enumerate(rows):
        if row["change"] is not None:
            colour = POSITIVE if row["validated"] else NEUTRAL
            bars = None
            if row["change_low"] is not None:
                bars = [[row["change"] - row["change_low"]], [row["change_high"] - row["change"]]]
            ax.errorbar(row["change"], i, xerr=bars, fmt="D", color=colour, capsize=3)
        if row["random_change"] is not None:
            ax.plot(row["random_change"], i + 0.2, "x", color=NEUTRAL)
        if row["prompting_change"] is not None:
            ax.plot(row["prompting_change"], i - 0.2, "|", color=NEGATIVE, markersize=10)
    ax.axvline(0, color=NEUTRAL, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [row["trait"] for row in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(
        "change of the trait score (orange: validated, ×: random directions, |: system prompt)", fontsize=8
    )
    ax.set_title(f"{title}: steering", fontsize=10)
    return png(drawn)
