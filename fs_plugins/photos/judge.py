"""The judge of captions of photographs: a sentence encoder that pip can install."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from zipfile import ZipFile

from fs_plugins.evaluation.judges import Judge, SentenceSimilarity
from fs_plugins.photos.parts import sentence_encoder_file

NAME = "all-minilm-l6-v2"


def sentences() -> Judge:
    """Compares captions by all-MiniLM-L6-v2's embeddings, which its package holds as an archive.

    Raises:
        SettingError: its package, or sentence-transformers, is not installed.
        JudgeError: it cannot be loaded.
    """
    archive = sentence_encoder_file()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with ZipFile(archive) as packed:
            packed.extractall(folder)
        return SentenceSimilarity(folder, called=NAME)
