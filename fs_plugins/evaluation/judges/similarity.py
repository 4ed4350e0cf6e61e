"""A sentence model, on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fs_plugins.checks import whole
from fs_plugins.errors import JudgeError
from fs_plugins.evaluation.judges.packages import package
from fs_plugins.sources import offline


class SentenceSimilarity:
    """The cosine of the texts' sentence embeddings, negative ones as 0.

    Its scores are not those of an LLM judge: the thresholds 0.5 and 0.3 were set for the latter.

    Args:
        model: a model of sentence-transformers: its name on the Hugging Face hub (downloaded on first use, unless
            FS_PLUGINS_OFFLINE is 1), or a folder.
        batch_size: pairs that are embedded at a time.
        called: its name in results, where ``model`` is a folder that says nothing.

    Raises:
        SettingError: sentence-transformers is not installed, or ``batch_size`` is below 1.
        JudgeError: the model cannot be loaded.
    """

    def __init__(
        self, model: str = "sentence-transformers/all-MiniLM-L6-v2", *, batch_size: int = 32, called: str | None = None
    ) -> None:
        batch_size = whole("batch_size", batch_size)
        module = package("sentence_transformers", "The judge of sentence similarity")
        self.model = model
        self.called = called or model
        self.batch_size = batch_size
        variable = offline()
        try:
            self._encoder = module.SentenceTransformer(model, local_files_only=variable is not None)
        except Exception as error:
            remedy = f"unset {variable}" if variable else "check the name and the network"
            raise JudgeError(
                f"The sentence model {model!r} cannot be loaded: {type(error).__name__}: {error} "
                f"To download it from the Hugging Face hub, {remedy}; without a network, give the path of a folder "
                "that holds a model of sentence-transformers."
            ) from error

    @property
    def name(self) -> str:
        return f"similarity({self.called})"

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Iterator[float]:
        """See ``Judge.scores``; yielded a batch at a time.

        Raises:
            JudgeError: an embedding is not finite.
        """
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            said, reference = (self._embed(texts) for texts in zip(*batch, strict=True))
            for pair, cosine in zip(batch, (said * reference).sum(axis=1), strict=True):
                if not np.isfinite(cosine):
                    raise JudgeError(
                        f"The sentence model {self.model!r} gives an embedding that is not finite for {pair[0]!r} or "
                        f"{pair[1]!r}. Its weights are damaged, or of a type this machine cannot compute in."
                    )
                yield float(np.clip(cosine, 0, 1))

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) unit vectors."""
        found = self._encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float64)
