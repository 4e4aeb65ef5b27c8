"""What the README says runs, runs; what it points at, exists."""

import re


def test_the_python_example_runs(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (repository / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "digits.keras").is_file()
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
    commands = ("doctor", "backbones", "predict", "evaluate", "export", "verify")
    assert [name for name in commands if f"tftransfer {name}" not in text] == []
