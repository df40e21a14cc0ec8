"""Shared fixtures. Models are tiny, seeded and made once a session; treat their folders as read-only."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only waits for the first
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def _home(tmp_path_factory, pytestconfig):
    """A folder of this session's, where compiled kernels are those of all sessions: their names hold what they are."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir()
    if (cache := getattr(pytestconfig, "cache", None)) is not None:
        (home / "kernels").symlink_to(cache.mkdir("kernels"), target_is_directory=True)
    return home


@pytest.fixture(autouse=True)
def _own_home(_home, monkeypatch):
    """Measurements of tests never mix with the user's."""
    monkeypatch.setenv("AUTOTUNE_HOME", str(_home))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """kind -> folder, made on first use: llama, llama-tied, llama-bf16, gpt2, bert."""
    import tiny
    import torch

    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            changes = {"tie_word_embeddings": True} if name == "llama-tied" else {}
            dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
            tiny.make_model(name.partition("-")[0], path, dtype, **changes)
        return path

    return get


@pytest.fixture(scope="session")
def llama(models):
    return models("llama")


@pytest.fixture(scope="session")
def opened_llama(llama):
    from autotune.model import open_model

    return open_model(str(llama))


@pytest.fixture(scope="session")
def databases(models, tmp_path_factory):
    """kind -> (opened model, space, database of every legal scheme), made on first use."""
    import tiny

    from autotune.compress import database
    from autotune.model import load_model, open_model

    made = {}

    def get(name: str):
        if name not in made:
            opened = open_model(str(models(name)))
            space = tiny.space_of(opened.spec)
            model = load_model(opened)
            folder = tmp_path_factory.mktemp(f"database-{name}")
            made[name] = opened, space, database.build(model, opened.spec, space, tiny.tokens(4), folder)
        return made[name]

    return get


@pytest.fixture
def checkpoint_copy(llama, tmp_path):
    """A folder of one's own with the tiny Llama's files, to be damaged."""
    import shutil

    return Path(shutil.copytree(llama, tmp_path / "model"))
