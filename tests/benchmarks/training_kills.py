"""Kill training with SIGKILL at two hundred random moments, and check checkpoints and final weights.

The newest checkpoint must load, and a resumed run must end with the weights of an uninterrupted run. Each round starts
or resumes the command in a process forked from one that has imported torch, until it is killed or finished. A finished
run is compared bit for bit and then started again.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from report import save

KILLS = 200
NOISE = ["--set", "lora.dropout=0.1"]  # so that the random generator's state is tested, too
STAGES = {
    "dpo": (
        ["dpo", "--pref", "helpful", "--direction", "pos", "--limit", "192", "--set", "dpo.optimizer=adamw_torch"],
        Path("dpo/helpful/pos"),
    ),
    "sft": (["sft", "--set", 'sft.data="demo:conversations?rows=120"', "--set", "sft.batch_size=8"], Path("sft/start")),
    "reward": (
        ["reward", "--set", 'reward.ratings.demo.data="demo:ratings?rows=120"', "--set", "reward.batch_size=8"],
        Path("reward/reward"),
    ),
}
TENSORS = ("adapter_model.safetensors", "heads.safetensors")


def command(folder: str, words: list[str]) -> None:
    """Run the command in a folder, with its output in a file there."""
    from lora_align.cli import main

    os.chdir(folder)
    with open("out.txt", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["lora-align", *words]
    main()


def words(stage: str) -> list[str]:
    """Return the arguments of every round, with a checkpoint after each step."""
    return [*STAGES[stage][0], *NOISE, "--set", f"{stage}.save_minutes=0"]


def newest(unfinished: Path) -> Path | None:
    """Return the checkpoint with the highest number, complete or not."""
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in unfinished.glob("checkpoint-*")}
    return checkpoints[max(checkpoints)] if checkpoints else None


def loads(checkpoint: Path) -> bool:
    """Return whether training would resume from this checkpoint and every tensor in it can be read."""
    import torch
    from safetensors.torch import load_file

    from lora_align.console import Screen
    from lora_align.train.checkpoints import Checkpoints

    if Checkpoints(checkpoint.parent, {}).begin(Screen(quiet=True)) != checkpoint:
        return False
    load_file(checkpoint / "trained.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)
    return True


def main() -> None:
    """Kill and resume until the number of kills is reached; then let the last run finish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training-kills"))
    work = parser.parse_args().work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_align.train.dpo", "lora_align.train.sft", "lora_align.train.reward"])
    draw, counted, lasts = random.Random(0), Counter[str](), {}
    for stage in STAGES:
        control = work / f"control-{stage}"
        control.mkdir(parents=True)
        for _ in range(2):  # the first run tokenises, computes references and starts the server
            shutil.rmtree(control / "runs", ignore_errors=True)
            began = time.monotonic()
            child = context.Process(target=command, args=(str(control), words(stage)))
            child.start()
            child.join()
            assert child.exitcode == 0, (control / "out.txt").read_text()
            lasts[stage] = time.monotonic() - began
    while counted["kills"] < KILLS:
        stage = draw.choice(list(STAGES))
        counted[f"runs of {stage}"] += 1
        folder, path = work / "killed", STAGES[stage][1]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        unfinished = (folder / "runs" / path).parent / f".{path.name}.unfinished"
        while True:
            child = context.Process(target=command, args=(str(folder), [*words(stage), "--resume"]))
            child.start()
            child.join(draw.uniform(0, lasts[stage]) if counted["kills"] < KILLS else None)
            if child.exitcode is None:
                child.kill()
                child.join()
                counted["kills"] += 1
                if checkpoint := newest(unfinished):
                    counted["with a checkpoint"] += 1
                    counted["newest checkpoints that did not load"] += not loads(checkpoint)
                continue
            assert child.exitcode == 0, (folder / "out.txt").read_text()
            counted["finished"] += 1
            ours, theirs = work / f"control-{stage}" / "runs" / path, folder / "runs" / path
            counted["finished with other weights"] += any(
                (ours / name).read_bytes() != (theirs / name).read_bytes() for name in TENSORS if (ours / name).exists()
            )
            break
    counted["newest checkpoints that did not load"] += 0
    counted["finished with other weights"] += 0
    seconds = {f"seconds of {stage}, not killed": round(lasts[stage], 1) for stage in STAGES}
    save("training_kills", {**dict(sorted(counted.items())), **seconds})


if __name__ == "__main__":
    main()
