"""Fixtures that several test files share."""

import gc
import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels run on the CPU in this process; what compiles them does so in another one.
    os.environ["TRITON_INTERPRET"] = "1"


SHARED_FOLDER = "FASTDPO_TESTS_SHARED_FOLDER"
"""The environment variable that names a folder which all processes of one run share."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """A folder that the processes of this run share; the first of them makes and removes it."""
    if SHARED_FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="fastdpo-tests-")
        os.environ[SHARED_FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop(SHARED_FOLDER))


def pytest_unconfigure() -> None:
    """Triton's bindings count what is left at the end."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """What is imported stays: collections, which accelerate asks for, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real small inputs beside the checkout; absent on a stranger's machine."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real inputs in {folder}, which are not part of the project")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long forms of the tests")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms are asked for."""
    return request.config.getoption("--soak")
