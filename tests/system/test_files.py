"""files.py where the system is not POSIX: imports, and a lock by a file."""

import importlib
import os
import pkgutil
import signal
import sys

import filelock
import pytest

import fastdpo
from fastdpo.system import files
from tests.ref_cache.test_faults import exit_code, in_a_child

POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")


def import_every_module_without_posix():
    """Import the package anew as on Windows: no POSIX modules, no folder descriptors, no Triton."""
    for name in [name for name in sys.modules if name.split(".")[0].startswith("fastdpo")]:
        del sys.modules[name]
    for name in (*POSIX_ONLY, "triton"):
        sys.modules[name] = None
    del os.O_DIRECTORY
    again = importlib.import_module("fastdpo")
    modules = [each.name for each in pkgutil.walk_packages(again.__path__, "fastdpo.")]
    assert len(modules) > 80
    for name in modules:
        importlib.import_module(name)


def test_every_module_imports_without_posix_modules_and_triton(capfd):
    for name in [each.name for each in pkgutil.walk_packages(fastdpo.__path__, "fastdpo.")]:
        importlib.import_module(name)  # so that their libraries are there, as on Windows
    code = exit_code(in_a_child(import_every_module_without_posix))
    assert code == 0, capfd.readouterr().err


def test_without_fcntl_a_lock_file_keeps_the_second_out(tmp_path, monkeypatch):
    folder, locks = tmp_path / "out", tmp_path / "locks"
    folder.mkdir()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with files.exclusive_lock(folder, locks) as alone:
        assert alone
        with pytest.raises(BlockingIOError), files.exclusive_lock(link, locks):
            pytest.fail("held twice")
        with files.exclusive_lock(tmp_path, locks) as other:
            assert other, "another folder is another lock"
        assert not list(folder.iterdir()), "the folder itself stays as it is"
    with files.exclusive_lock(folder, locks) as alone:
        assert alone


def test_a_lock_file_dies_with_its_holder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)

    def hold_and_die():
        with files.exclusive_lock(tmp_path, tmp_path / "locks"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(in_a_child(hold_and_die)) == -signal.SIGKILL
    with files.exclusive_lock(tmp_path, tmp_path / "locks") as alone:
        assert alone


def test_a_soft_lock_is_never_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    for _ in range(2):
        with files.exclusive_lock(tmp_path, tmp_path / "locks") as alone:
            assert not alone
    assert not (tmp_path / "locks").exists()
