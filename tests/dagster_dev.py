"""A real `dagster dev` over a project in a folder, as a user starts it. A helper of the tests: see `load_helper`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from trait_assets.paths import REPOSITORY


def environment(root: Path, **more: str) -> dict[str, str]:
    """That of a user whose project lies under `root`: nothing of the caller's own project or keys."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "DAGSTER_", "TRAITS_"))}
    return {
        **env,
        "TRAITS_DATASETS": str(root / "datasets"),
        "TRAITS_EXPERIMENTS": str(root / "experiments"),
        "TRAITS_STATE": str(root / "state"),
        **more,
    }


@contextmanager
def serving(root: Path, env: Mapping[str, str], home: str) -> Iterator[str]:
    """The address of a webserver with its daemon on the instance `home`, ended with the block; what they say is in
    dev.log. They may still be starting when the block begins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (root / "dev.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "dagster"), "dev", "-w", "workspace.yaml", "-p", str(port)],
            cwd=REPOSITORY,
            env={**env, "DAGSTER_HOME": home},
            stdout=log,
            stderr=log,
            # with all that it starts, so that all of it can be ended
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            # on a busy machine it takes its time over its children, and whatever is left would go on ticking
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
