"""Compare two checkouts: the JSON keys of every command, and the bytes of every adapter on fixed seeds.

    python tests/benchmarks/same_results.py OLD_CHECKOUT NEW_CHECKOUT --work FOLDER

Run the script after a refactoring that must not change results. It prints every difference. It exits with 1 if there
is one.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SMALL = ["--set", "dpo.limit=64", "--set", "dpo.held_out=0.2"]
EVAL = [
    f"--set=eval.{key}={value}" for key, value in {"count": 3, "samples": 1, "pairs": 4, "max_new_tokens": 20}.items()
]
RSF = ["rsf.data=demo:conversations?rows=60", "rsf.per_prompt=2", "rsf.samples=3", "rsf.bootstrap=6", "rsf.epochs=1"]
COMMANDS = {
    "recipes": ["recipes"],
    "data": ["data", "--pref", "helpful"],
    "plan": ["plan"],
    "dpo helpful": ["dpo", "--pref", "helpful", *SMALL],
    "dpo harmless": ["dpo", "--pref", "harmless", *SMALL],
    "reward": ["reward", "--set", "reward.ratings.demo.data=demo:ratings?rows=160"],
    "rsf": ["rsf", "--iterations", "2", *(f"--set={setting}" for setting in RSF)],
    "merge": ["merge", "--weights", "helpful=1,harmless=0.5"],
    "merge ties": ["merge", "--weights", "helpful=1,harmless=0.5", "--method", "ties", "--name", "ties"],
    "merge rank": ["merge", "--weights", "helpful=1,harmless=0.5", "--rank", "8", "--name", "low"],
    "inspect": ["inspect", "helpful", "harmless"],
    "list": ["list"],
    "chat": ["chat", "--weights", "helpful=1", "--prompt", "Tell me about rain.", "--temperature", "0"],
    "generate": ["generate", "--prompts", "demo:pairs?rows=4", "--out", "answers.jsonl", "--seed", "3"],
    "score": ["score", "--data", "answers.jsonl", "--out", "scored.jsonl"],
    "eval": ["eval", "helpful=1", "start", *EVAL],
    "sweep": ["sweep", "helpful=0:1:1", *EVAL],
    "tune": ["tune", "--aim", "helpful=1", *EVAL],
    "reach": ["reach", "helpful", *EVAL],
    "doctor": ["doctor"],
}


def results(checkout: Path, folder: Path) -> dict[str, Any]:
    """Run all commands of a checkout in an empty folder; return keys by command and hashes by file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    environment["LORA_ALIGN_CACHE"] = str(folder / "cache")
    report: dict[str, Any] = {}
    for name, words in COMMANDS.items():
        program = [sys.executable, "-m", "lora_align", *words, "--json"]
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
        keys = sorted(keys_of(json.loads(done.stdout))) if done.stdout.strip() else []
        error = done.stderr[-400:] if done.returncode else ""
        report[name] = {"code": done.returncode, "keys": keys, "error": error}
        print(f"{checkout}: {name} {done.returncode}", file=sys.stderr, flush=True)
    files = [
        *folder.glob("runs/**/*.safetensors"),
        *folder.glob("*.jsonl"),
        *folder.glob("runs/**/adapter_config.json"),
    ]
    report["files"] = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(files)
    }
    return report


def keys_of(value: Any, before: str = "") -> set[str]:
    """Return the path of every key, without list indices."""
    if isinstance(value, dict):
        return {path for key, of in value.items() for path in {f"{before}.{key}", *keys_of(of, f"{before}.{key}")}}
    if isinstance(value, list):
        return {path for of in value for path in keys_of(of, f"{before}[]")}
    return set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    old, new = (results(checkout, options.work / name) for name, checkout in vars(options).items() if name != "work")
    differences = 0
    for name in (*COMMANDS, "files"):
        before, now = old[name], new[name]
        if name == "files":
            changed = [file for file in {**before, **now} if before.get(file) != now.get(file)]
            print(f"files: {len(before)} before, {len(now)} now; different: {changed or 'none'}")
            differences += len(changed)
            continue
        gone, fresh = set(before["keys"]) - set(now["keys"]), set(now["keys"]) - set(before["keys"])
        same = before["code"] == now["code"] and not gone and not fresh
        print(f"{name}: {len(now['keys'])} keys, exit {now['code']}" + ("" if same else f"; was {before['code']}"))
        for sign, paths in (("-", gone), ("+", fresh)):
            top = [path for path in sorted(paths) if path.rpartition(".")[0].removesuffix("[]") not in paths]
            print("".join(f"  {sign} {path}\n" for path in top), end="")  # without the keys below them
        print(f"  {now['error']}" if now["error"] else "", end="")
        differences += not same
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
