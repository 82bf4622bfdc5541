"""Which tokens a position picked, kept as text beside the states that were averaged over them.

Belongs here: how those strings travel through the journal and the artifact, and the few rows that are shown.
Does not: picking tokens (`resources/models/positions.py`), tokenising (`LanguageModel.preview`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np

SAMPLE_ROWS = 3
# A prompt of thousands of tokens is shown by both ends; how many were left out is said.
SHOWN_TOKENS = 256


class _Polar(Protocol):
    @property
    def polarity(self) -> str: ...


_R = TypeVar("_R", bound=_Polar)


def token_name(position: str) -> str:
    """The name under which a captured row carries the strings of a position."""
    return f"tokens|{position}"


def pack_strings(strings: Sequence[str]) -> np.ndarray:
    """The strings as [bytes] uint8: JSON, so that every string comes back as it was."""
    import numpy as np

    return np.frombuffer(json.dumps(list(strings)).encode("ascii"), dtype=np.uint8).copy()


def unpack_strings(packed: np.ndarray) -> list[str]:
    return [str(text) for text in json.loads(packed.tobytes())]


def join_strings(packed: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Many rows in two arrays of an artifact: the bytes one after the other, and where each row ends."""
    import numpy as np

    return {
        "token_text": np.concatenate(packed),
        "token_ends": np.cumsum([len(row) for row in packed], dtype=np.int64),
    }


def stored_strings(tensors: Mapping[str, np.ndarray], row_keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Row key → packed strings; empty for an artifact that was written without them."""
    import numpy as np

    if "token_text" not in tensors:
        return {}
    rows = np.split(tensors["token_text"], tensors["token_ends"][:-1])
    return dict(zip(row_keys, rows, strict=True))


def sample_rows(train: Sequence[_R]) -> list[_R]:
    """The rows that are shown: the first train rows of both sides in turn, positive first."""
    sides = [[row for row in train if row.polarity == polarity] for polarity in ("positive", "negative")]
    turns = [side[i] for i in range(SAMPLE_ROWS) for side in sides if i < len(side)]
    return turns[:SAMPLE_ROWS]


def token_sample(key: str, line: int, packed: np.ndarray) -> dict[str, Any]:
    """One row as metadata shows it: its scenario, how many tokens were averaged, and which."""
    strings = unpack_strings(packed)
    sample: dict[str, Any] = {"row": key, "line": line, "n_tokens": len(strings), "tokens": strings}
    if len(strings) > SHOWN_TOKENS:
        half = SHOWN_TOKENS // 2
        sample["tokens"] = [*strings[:half], *strings[-half:]]
        sample["omitted_in_the_middle"] = len(strings) - SHOWN_TOKENS
    return sample


def sample_table(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For the UI: one line per position and sampled row, the tokens set apart by bars."""
    return [
        {
            "position": position,
            "row": sample["row"],
            "line": sample["line"],
            "tokens": sample["n_tokens"],
            "averaged over": _shown(sample),
        }
        for position, of_position in samples.items()
        for sample in of_position
    ]


def _shown(sample: Mapping[str, Any]) -> str:
    strings = [text.replace("\n", "⏎").replace("|", "¦") for text in sample["tokens"]]
    if "omitted_in_the_middle" in sample:
        half = len(strings) // 2
        strings[half:half] = [f"… {sample['omitted_in_the_middle']} more …"]
    return "|".join(strings)
