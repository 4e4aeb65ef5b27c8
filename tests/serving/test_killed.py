"""A process that publishes is killed: whatever bears a number afterwards is whole, and the next one tidies up."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tftransfer import serving
from tftransfer.serving import publication

_BEGIN = """
    import hashlib, os, random, signal, sys, time
    from pathlib import Path
    from tftransfer.serving import publication
    from tftransfer.serving.verification import Verification

    root = Path(sys.argv[1])

    def build(folder):
        content = os.urandom(100_000)
        (folder / "variables").mkdir()
        (folder / "variables" / "data").write_bytes(content)
        (folder / "saved_model.pb").write_text(hashlib.sha256(content).hexdigest())

    def publish():
        return publication.publish_directory(build, root, lambda _: Verification(()), keep=2)[0]

    def whole(version):
        content = (version / "variables" / "data").read_bytes()
        return (version / "saved_model.pb").read_text() == hashlib.sha256(content).hexdigest()

    def all_is_well(before):
        numbers = publication.versions(root)
        assert all(whole(root / str(number)) for number in numbers), "half a version bears a number"
        assert max(numbers) >= int(before.name), "the version that was served is gone"
        newest = publish()
        assert whole(newest) and int(newest.name) > max(numbers)
        left = sorted(os.listdir(root), key=len)
        assert all(name.isdecimal() for name in left) and len(left) <= 2, left
        return newest

    def killed(child):
        process = os.fork()
        if process:
            return process
        child()
        os._exit(0)
"""

_AT_RANDOM = """
    generator, newest, fallen = random.Random(0), publish(), 0
    def forever():
        while True:
            publish()
    for _ in range(50):
        process = killed(forever)
        time.sleep(generator.uniform(0.0005, 0.05))
        os.kill(process, signal.SIGKILL)
        fallen += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        newest = all_is_well(newest)
    print(fallen)
"""

_AT_EVERY_CALL = """
    newest, fallen = publish(), 0
    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
        original = getattr(os, name)
        place = 0
        while True:
            place += 1
            def child():
                calls = []
                def counted(*given, **named):
                    calls.append(given)
                    if len(calls) == place:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*given, **named)
                setattr(os, name, counted)
                publish()
            process = killed(child)
            died = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            newest = all_is_well(newest)
            if not died:
                break
            fallen += 1
        assert place > 1, f"{name} is never called"
    print(fallen)
"""


def _run(code, folder):
    program = textwrap.dedent(_BEGIN) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path):
    assert _run(_AT_RANDOM, tmp_path / "serving") == 50


def test_killed_at_every_call_that_changes_the_disk(tmp_path):
    assert _run(_AT_EVERY_CALL, tmp_path / "serving") >= 12


_FOR_EVER = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from conftest import LABELS, small_network
    from tftransfer import serving, tasks

    while True:
        version, _ = serving.publish(small_network(), tasks.SingleLabel(LABELS), sys.argv[1], repeats=2, keep=2)
        print(version, flush=True)
"""


@pytest.mark.slow
def test_what_is_published_loads_after_every_kill(model, task, pictures, tmp_path):
    """As above with real networks, of which each version takes seconds."""
    moment, served = random.Random(0), tmp_path / "serving"
    command = [sys.executable, "-c", textwrap.dedent(_FOR_EVER), str(served), str(Path(__file__).parent)]
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            told = process.stdout.readline()
            time.sleep(moment.uniform(0, 6))
            process.kill()
        newest = publication.newest_version(served)
        assert int(newest.name) >= int(Path(told.strip()).name)
        verification = serving.verify(newest, pictures, model=model, task=task, repeats=2, batch_sizes=(1,))
        assert verification.passed, verification.lines()
    version, _ = serving.publish(model, task, served, pictures, repeats=2, keep=2)
    assert sorted(os.listdir(served), key=int) == [str(int(version.name) - 1), version.name]
