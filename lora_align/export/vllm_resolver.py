"""A plug-in of vLLM: a request whose model is `helpful=1,harmless=-0.5` is answered by that mix.

vLLM imports this module in each of its processes, so the module itself imports little. It works without the
dependencies of training, because vLLM pins its own versions of some.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lora_align import store
from lora_align.errors import RunFailedError, UserError
from lora_align.mix_weights import LARGEST, parse_weights

if TYPE_CHECKING:
    from lora_align.policy.vectors import Vector

RUNS = "LORA_ALIGN_RUNS"  # the runs folder; without it, the plug-in does nothing
MIXES = "LORA_ALIGN_MIXES"  # the most names of mixes that one server process serves
GRID = 64  # weights are rounded to multiples of 1/64
DEFAULT_MIXES = "1000"
MERGES = 2  # at the same time
ABANDONED = 3600.0  # seconds after which an unfinished folder is deleted
NAME = re.compile(r"[\w-]+(/[\w-]+)*(@\d+(-\d+)?)?")  # of a preference or a run; no other folder can be named

logger = logging.getLogger("vllm.lora_align")  # below vLLM's logger, which shows its messages


@dataclass
class MixResolver:
    """Finds or makes the adapter of a mix that a request names."""

    runs_dir: Path
    most: int
    names: set[str] = field(default_factory=set)
    merging: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MERGES))
    counting: threading.Lock = field(default_factory=threading.Lock)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's request for the adapter of a mix; None if the name is not one, which vLLM answers with 404.

        vLLM asks once for each name, and reads the folder again whenever it has dropped the adapter from memory.
        """
        if "=" not in lora_name:
            return None
        try:
            folder = await self._made(base_model_name, lora_name)
        except (UserError, RunFailedError, OSError) as fault:
            logger.warning("%.200r: %s", lora_name, fault)
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name, 1, str(folder))  # vLLM sets the number

    async def _made(self, served: str, name: str) -> Path:
        """Call `folder` in a thread. MERGES threads run at most, also if vLLM cancels requests that wait for them."""
        await self.merging.acquire()
        thread = asyncio.ensure_future(asyncio.to_thread(self.folder, served, name))
        thread.add_done_callback(self._release)
        return await asyncio.shield(thread)

    def _release(self, thread: "asyncio.Future[Path]") -> None:
        self.merging.release()
        thread.exception()  # asyncio would report an error that a cancelled request does not fetch

    def folder(self, served: str, name: str) -> Path:
        """Return the folder with a mix for the served base. Merge it if it is missing or damaged."""
        from lora_align.runs import SCHEMA

        asked = parse_weights(name)
        weights = {key: round(weight * GRID) / GRID for key, weight in asked.items() if abs(weight) <= LARGEST}
        if len(weights) < len(asked) or not any(weights.values()):
            raise UserError(f"expected weights up to ±{LARGEST:g} that do not all round to 0 (in steps of 1/{GRID})")
        found = {key: self._vector(key) for key in weights}
        _refuse_other_base(served, found.values())
        lineage = [[weights[key], vector.lineage()] for key, vector in sorted(found.items())]
        content = hashlib.sha256(json.dumps([SCHEMA, lineage]).encode()).hexdigest()[:32]
        folder = store.cache_folder() / "mixes" / content
        with self.counting:
            added = name not in self.names
            if added and len(self.names) >= self.most:
                raise UserError(f"{self.most} mixes were named already; raise {MIXES}, or restart the server")
            self.names.add(name)  # before the merge, so that merges under way count
        try:
            self._merge(folder, weights, found)
        except BaseException:
            if added:
                self.names.discard(name)
            raise
        return folder

    def _vector(self, name: str) -> "Vector":
        from lora_align.policy import vectors

        vector = vectors.find(name, self.runs_dir) if NAME.fullmatch(name) else None
        inside = self.runs_dir.resolve()
        if not vector or not all(of.folder.resolve().is_relative_to(inside) for of in vector.parents):
            raise UserError(f"{name!r} is not the name of a preference or a run in {self.runs_dir}")
        return vector

    def _merge(self, folder: Path, weights: Mapping[str, float], found: Mapping[str, "Vector"]) -> None:
        """Merge into a folder, unless it is intact. One process at a time does it."""
        from filelock import FileLock

        from lora_align import recipe, runs
        from lora_align.adapters.merge_options import MergeOptions
        from lora_align.commands.merge import merge_adapters
        from lora_align.console import Screen

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.once")):
            if folder.is_dir():
                try:
                    runs.read(folder).check_files()
                except UserError as fault:
                    if isinstance(fault.__cause__, OSError):  # too many open files, for example: not damaged
                        raise
                    logger.warning("%s; it is merged again", fault)
                    shutil.rmtree(folder)
                else:
                    return
            for left in folder.parent.glob(f".{folder.name}.*"):  # by a server that was killed
                if left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
            made = next(run for vector in found.values() for run in vector.known_runs())
            settings = recipe.from_dict(made.manifest.recipe, str(made.path))
            how, screen = MergeOptions(fit="vllm"), Screen(quiet=True)
            aside = folder.with_name(f".{folder.name}.{uuid4().hex}")  # another node may not see the lock
            merge_adapters(weights, settings, self.runs_dir, screen, how, out=aside, by_name=found)
            try:
                aside.rename(folder)
            except OSError:
                shutil.rmtree(aside)
                if not folder.is_dir():
                    raise


def register() -> None:
    """Register the plug-in with vLLM, if LORA_ALIGN_RUNS names a runs folder."""
    folder = os.environ.get(RUNS)
    if not folder:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    most = os.environ.get(MIXES, DEFAULT_MIXES)
    if not most.isdecimal():
        raise UserError(f"{MIXES}={most!r}: expected a number")
    if not Path(folder).expanduser().is_dir():
        logger.warning("%s=%r: there is no such folder yet", RUNS, folder)
    os.environ.setdefault("LORA_ALIGN_CACHE", str(Path.home() / ".cache" / "lora-align"))  # without platformdirs
    resolver = MixResolver(Path(folder).expanduser(), int(most))
    LoRAResolverRegistry.register_resolver("lora-align", resolver)


def _refuse_other_base(served: str, found: Iterable["Vector"]) -> None:
    """Refuse vectors of another base than the served one, by its hub id or by the hash of its local files."""
    from lora_align.model.base_folder import fingerprint, weight_files
    from lora_align.policy import vectors

    base, _ = vectors.common_base(found)
    if base is None:
        raise UserError("the base of these adapters is unknown: they have no manifest")
    files = weight_files(Path(served)) if Path(served).is_dir() else []
    if not (fingerprint(files) == base["fingerprint"] if files else served == base["model"]):
        raise UserError(f"the vectors were trained on {base['model']}, but this server runs {served}")
