import os

# One thread: bit-for-bit comparisons must not depend on the machine, and tests share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import io
import resource
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
import torch
from fakes import make_checkpoint
from pages import run_writer
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast.rollout.encoder import Encoder


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(checkpoint_folder):
    return AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoder(checkpoint_folder):
    return Encoder(AutoTokenizer.from_pretrained(checkpoint_folder))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A run takes SIGINT and SIGTERM for itself; the test's own are put back afterwards."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def file_limit():
    """`with file_limit(bytes)` bounds the size of files: stands for a full disk, with the same errors of the same calls.

    What is printed meanwhile goes nowhere: pytest keeps it in files.
    """

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def run_folder(tmp_path):
    """A function that writes a run folder: keyword arguments replace the files of a small finished run."""
    return run_writer(tmp_path)
