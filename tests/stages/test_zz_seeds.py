import re, shutil, os, pytest
from pathlib import Path
from support import Terminal
from test_rsf import made  # noqa


@pytest.mark.parametrize("seed", range(4, 12))
def test_seed(made, workspace, seed):
    shutil.copytree(made / "runs" / "rsf", workspace / "runs" / "rsf")
    t = Terminal(workspace, "chat", "--want", "helpfulness=0.8,verbosity=-0.6", "--seed", str(seed))
    t.wait_for("› ")
    t.say("Tell me about rain.")
    told = t.say("/compare rsf/policy/t2=1 | helpful=0 | rsf/policy/t2=0")
    print("SEED", seed, re.findall(r"\((\d+) tokens\)", told))
    os.write(t.screen, b"/quit\n")
    t.process.wait(timeout=20)
