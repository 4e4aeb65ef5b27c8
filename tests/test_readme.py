"""What the README says runs, runs; what it points at, exists."""

import re


def test_the_python_examples_run_one_after_the_other(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (repository / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile("".join(examples), "README.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"digits.keras", "digits.safetensors", "rates.png"}
    assert "head" in capsys.readouterr().out


def test_links_lead_somewhere(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


def test_strategies_and_commands_are_named(repository):
    from tftransfer import strategies

    text = (repository / "README.md").read_text(encoding="utf-8")
    assert [name for name in strategies.names() if f"`{name}" not in text] == []
    commands = ("doctor", "backbones", "strategies", "predict", "evaluate", "export", "verify")
    assert [name for name in commands if f"tftransfer {name}" not in text] == []
