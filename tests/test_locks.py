"""One run at a time in a folder, also where the file system has no locks."""

import errno
import os
import platform
import subprocess
import sys
import threading

import pytest

from tftransfer import locks, training
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


@pytest.fixture
def failing(monkeypatch):
    """Return a function that lets every attempt to lock a file fail with an error."""

    def fail(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(locks.fcntl, "flock", flock)

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_it_goes_on_and_says_so_once(failing, tmp_path, capsys, number):
    failing(number)
    for _ in range(2):
        with locks.held(tmp_path), locks.held(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
        assert not (tmp_path / ".lock").exists()
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{tmp_path} is on a file system without locks ({os.strerror(number)}): the run goes on")


def test_a_run_goes_on_without_locks(failing, tmp_path, capsys, small_network, small_task, small_data):
    failing(errno.ENOLCK)
    phase = Phase("probe", "head", 1)
    history = training.fine_tune(small_network(), small_task, small_data, (phase,), output=tmp_path, max_steps=1)
    assert history.complete
    assert capsys.readouterr().err.count("without locks") == 1


def test_without_locks_a_process_that_runs_still_holds_its_folder(failing, tmp_path):
    failing(errno.ENOLCK)
    lock = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lock.write_text(f"process {other.pid} on {platform.node()}")
        with pytest.raises(InputError, match=f"in use by another run .process {other.pid} on "), locks.held(tmp_path):
            pass
        other.communicate(b"\n")
    with locks.held(tmp_path):
        pass
    lock.write_text("process 1 on another-machine")
    with pytest.raises(InputError, match="If it has ended on another machine, remove"), locks.held(tmp_path):
        pass


def test_without_locks_an_earlier_process_of_the_same_number_holds_nothing(failing, tmp_path):
    failing(errno.ENOLCK)
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on {platform.node()}")
    refused = []

    def from_another_thread():
        try:
            with locks.held(tmp_path):
                pass
        except InputError as error:
            refused.append(str(error))

    with locks.held(tmp_path):
        thread = threading.Thread(target=from_another_thread)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_another_fault_is_not_taken_for_another_run(failing, tmp_path):
    failing(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locks.held(tmp_path):
        pass
