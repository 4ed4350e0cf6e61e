"""Judges by name, and those that need no network."""

from __future__ import annotations

import sys

import pytest
from serving import SECRET, taken

import fs_plugins
from fs_plugins import FSPluginsError, JudgeError, SettingError
from fs_plugins.evaluation.judges import Endpoint, ExactMatch, Judge, SentenceSimilarity, judge


@pytest.mark.parametrize(
    ("said", "reference", "score"),
    [
        ("A dog.", "a dog", 1.0),
        ("  a\n dog .", "A  Dog", 1.0),
        ("STRASSE", "straße", 1.0),
        ("a dog", "a dog!", 0.0),
        ("adog", "a dog", 0.0),
        ("3.", "3", 1.0),
        ("3.5", "35", 0.0),
        ("", "a", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_forgives_case_whitespace_and_the_full_stop(said, reference, score):
    assert list(ExactMatch().scores([(said, reference)])) == [score]


def test_every_judge_that_ships_is_a_judge():
    exact, endpoint = judge("exact"), judge("endpoint", url="http://127.0.0.1:9/v1", model="m")
    assert isinstance(exact, Judge)
    assert isinstance(endpoint, Judge)
    assert (type(exact), type(endpoint)) == (ExactMatch, Endpoint)
    assert list(exact.scores([])) == list(endpoint.scores([])) == []


def test_options_a_judge_does_not_take_are_named_without_their_values():
    with pytest.raises(SettingError, match=r"'endpoint': missing a required argument: 'model'\. It takes url, model,"):
        judge("endpoint", url="http://127.0.0.1:9")
    with pytest.raises(SettingError, match=r"'exact'.*It takes nothing; got api_key") as error:
        judge("exact", api_key=SECRET)
    assert SECRET not in str(error.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Words with vectors of our choice: a text's embedding is the mean of its words'."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        "[UNK]": (0, 0),
        "cat": (1, 0),
        "kitten": (0.6, 0.8),
        "dog": (0, 2),
        "anticat": (-3, 0),
        "hole": (np.nan, 0),
    }
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array(list(words.values()), dtype=np.float32)
    folder = tmp_path_factory.mktemp("judge") / "words"
    SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, embedding_weights=vectors)], device="cpu").save(
        str(folder)
    )
    return folder


def test_sentence_similarity_is_the_cosine_clamped_to_0_and_1(model):
    found = judge("similarity", model=str(model))
    assert found.name == f"similarity({model})"
    asked = {
        ("cat", "cat"): 1,
        ("cat", "kitten"): 0.6,
        ("kitten", "dog dog"): 0.8,
        ("cat", "dog"): 0,
        ("cat cat dog", "cat"): 2**-0.5,
        ("cat", "anticat"): 0,
        ("cat", ""): 0,
    }
    assert list(found.scores(list(asked))) == pytest.approx(list(asked.values()), abs=1e-6)


def test_sentence_similarity_does_not_depend_on_the_batches(model):
    asked = [(said, reference) for said in ("cat", "kitten", "dog cat") for reference in ("dog", "cat kitten")]
    whole = list(SentenceSimilarity(str(model)).scores(asked))
    assert list(SentenceSimilarity(str(model), batch_size=4).scores(asked)) == pytest.approx(whole, abs=1e-6)
    assert all(type(score) is float for score in whole)


def test_an_embedding_that_is_not_finite_is_an_error_and_no_score(model):
    found, error = taken(SentenceSimilarity(str(model)).scores([("cat", "cat"), ("hole", "cat"), ("cat", "cat")]))
    assert found == pytest.approx([1])
    assert "not finite for 'hole' or 'cat'" in str(error)


def test_a_sentence_model_that_does_not_load_says_what_to_do(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", "1")
    for name in ("someone/no-such-model", str(tmp_path / "absent")):
        with pytest.raises(JudgeError, match=rf"'{name}' cannot be loaded: .*\s.*unset FS_PLUGINS_OFFLINE.* folder"):
            judge("similarity", model=name)


@pytest.mark.parametrize(("value", "local"), [("1", True), ("0", False)])
def test_nothing_is_fetched_while_offline(model, monkeypatch, value, local):
    import sentence_transformers

    seen = []
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda name, **options: seen.append(options))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", value)
    SentenceSimilarity("someone/model")
    assert seen == [{"local_files_only": local}]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("sentence_transformers", SentenceSimilarity),
        ("httpx", lambda: Endpoint("http://127.0.0.1:9", "m")),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(package, make, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=rf'needs {package.replace("_", "-")}: pip install "fs-plugins\[judges\]"'):
        make()


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "sentence_transformers.py").write_text("import flux_capacitor", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    with pytest.raises(SettingError, match="is installed and cannot be imported: No module named 'flux_capacitor'"):
        SentenceSimilarity()


def test_judge_error_is_of_the_family():
    assert issubclass(JudgeError, FSPluginsError)
    assert issubclass(JudgeError, RuntimeError)
    assert fs_plugins.JudgeError is JudgeError
