"""The pipelines that the page can use, loaded when first asked for."""

import inspect
import json
import threading
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from companion.evaluation.comparison.classifier_side_by_side import classifier_guided, with_classifier
from companion.evaluation.comparison.side_by_side import Evaluator, as_tensor
from companion.evaluation.metrics.inversion import invert, shipped_regressor
from companion.minis import classifier, scene_regressor
from companion.pipelines.adm.classifier import EMBEDDED_CLASSIFIERS, off_the_shelf_classifier
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.hook import check_pipeline
from companion.pipelines.registry import WEIGHTS, load, model_names

CLASSIFIER_TAB = "Classifier guidance"
OWN = "its own"
"""The classifier that a pipeline comes with."""
DEFAULT_MODEL = "mini-sd"
"""The embedded model that best draws what it is asked for."""
_MINI = "mini-adm"


def embedded_names(*, classifier_guided: bool) -> tuple[str, ...]:
    """The embedded models that a classifier guides, or all others; the default model comes first."""
    kinds = {
        name: json.loads((WEIGHTS / name / "model_index.json").read_text())["_class_name"] for name in model_names()
    }
    names = [name for name, kind in kinds.items() if (kind == ADMPipeline.__name__) == classifier_guided]
    return tuple(sorted(names, key=lambda name: name != DEFAULT_MODEL))


Distances = Callable[[Sequence[Image.Image]], list[float]]
"""Pictures of scenes -> the distance of each from the nearest valid scene."""


def scene_distances(images: Sequence[Image.Image]) -> list[float]:
    """How far each picture is from the nearest scene that the renderer can draw: RMS over pixels, colours 0 to 1."""
    return invert(as_tensor(images)).residual.tolist()


class Models:
    """The pipelines the page can use, loaded when first asked for.

    Args:
        first: name, folder or hub name of the model to begin with.
        pipe: that model; one that a classifier guides is the first of the tab for those.
        device, dtype: for the others.
        local_only: offer the embedded models and `first` only; for a page that strangers can reach.

    Attributes:
        names, first: of the models under classifier-free guidance, and which of them comes first.
        guided_names, guided_first: of those that a classifier guides; there may be none.
        evaluator, distances: what looks at pictures of scenes when they are finished; None leaves it out.

    Raises:
        ValueError: guidance cannot be rectified in pipelines of this class.
    """

    def __init__(
        self,
        first: str,
        pipe: DiffusionPipeline,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        local_only: bool = False,
    ) -> None:
        check_pipeline(pipe)
        self.device, self.dtype, self.local_only = device, dtype, local_only
        given, adm = [first], isinstance(pipe, ADMPipeline)
        self.names = tuple(dict.fromkeys([*([] if adm else given), *embedded_names(classifier_guided=False)]))
        self.guided_names = tuple(dict.fromkeys([*(given if adm else []), *embedded_names(classifier_guided=True)]))
        if not self.names:
            raise ValueError("this copy of the package has no embedded model under classifier-free guidance; name one")
        self.first, self.guided_first = self.names[0], next(iter(self.guided_names), None)
        self._loaded: dict[str, DiffusionPipeline] = {first: pipe}
        self._guided: dict[tuple[str, str], ADMPipeline] = {}
        self._loading = threading.Lock()
        self.distances: Distances | None = scene_distances if scene_regressor.WEIGHTS.is_dir() else None
        if self.distances is not None:
            shipped_regressor()  # now, so that the first visitor does not wait for it
        self.evaluator: Evaluator | None = classifier.load_classifier() if classifier.WEIGHTS.is_dir() else None

    def pipe(self, name: str) -> DiffusionPipeline:
        """The pipeline of a model under classifier-free guidance.

        Raises:
            ValueError: it cannot be loaded, is not offered here, or is not supported.
        """
        pipe = self._pipe(name, self.names)
        if isinstance(pipe, ADMPipeline):
            raise ValueError(f"model {name!r} is guided by a classifier: choose it in the tab {CLASSIFIER_TAB!r}")
        return pipe

    def guided(self, name: str, chosen: str = OWN) -> ADMPipeline:
        """The pipeline of a model under the guidance of a classifier.

        Args:
            name: of the model.
            chosen: its own classifier, one of `classifiers(name)`, or a folder or hub name of another.

        Raises:
            ValueError: as `pipe`; the classifier is unavailable, or has other classes than the model.
        """
        pipe = self._pipe(name, self.guided_names)
        if not isinstance(pipe, ADMPipeline):
            raise ValueError(
                f"model {name!r} ({type(pipe).__name__}) is not guided by a classifier: choose an ADM pipeline"
            )
        if chosen == OWN:
            return classifier_guided(pipe)
        if self.local_only and chosen not in self.classifiers(name):
            raise ValueError(f"classifier {chosen!r} is not offered on this page; it has {self.classifiers(name)}")
        with self._loading:
            if (name, chosen) not in self._guided:
                guide = off_the_shelf_classifier(chosen, dtype=self.dtype)
                self._guided[name, chosen] = classifier_guided(with_classifier(pipe, guide))
            return self._guided[name, chosen]

    def classifiers(self, name: str | None) -> tuple[str, ...]:
        """The classifiers to choose from for a model."""
        shipped = tuple(each for each in EMBEDDED_CLASSIFIERS if (WEIGHTS / each).is_dir())
        return shipped if name == _MINI and shipped else (OWN,)

    def _pipe(self, name: str, offered: tuple[str, ...]) -> DiffusionPipeline:
        if not name:
            raise ValueError("choose a model")
        if self.local_only and name not in offered:
            raise ValueError(f"model {name!r} is not offered on this page; it has {', '.join(offered) or 'none'}")
        if name in self._loaded:  # without waiting for another model that is being loaded
            return self._loaded[name]
        with self._loading:
            if name not in self._loaded:
                pipe = load(name, device=self.device, dtype=self.dtype)
                check_pipeline(pipe)
                _check_arguments(pipe)
                self._loaded[name] = pipe
            return self._loaded[name]


def _check_arguments(pipe: DiffusionPipeline) -> None:
    """Raises `ValueError` for a pipeline that cannot draw from prompts or classes alone."""
    _, *parameters = inspect.signature(type(pipe).__call__).parameters.values()
    known = ("prompt", "class_labels", parameters[0].name)
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name not in known
    ]
    if needed or "image" in [each.name for each in parameters[:2]]:
        raise ValueError(
            f"{type(pipe).__name__} needs {' and '.join(needed) or 'image'}, which this page cannot give: "
            "choose a model that draws from prompts or classes alone"
        )
