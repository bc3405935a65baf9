"""Models that several files of tests read, made once."""

import pytest
from tiny_models import LEARNT, make_bert, make_llama, make_t5


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def learnt(tmp_path_factory):
    """A model that writes the texts of `LEARNT` once they are begun."""
    return make_llama(tmp_path_factory.mktemp("models") / "learnt", learnt=LEARNT)


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("models") / "t5")
