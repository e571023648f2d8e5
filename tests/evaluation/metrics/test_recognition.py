"""Drawing by class and counting what a classifier recognises."""

import torch

import companion
from companion import RectifiedGuidanceConfig
from companion.evaluation.metrics.recognition import draw_classes, recognised
from tests.pipelines.tiny import tiny_dit


def test_recognised_counts_agreement():
    images = torch.zeros(4, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0.0, 1.0, 2.0, 2.0])

    def classifier(batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(batch[:, 0, 0, 0].long(), 3).float()

    assert recognised(images, torch.tensor([0, 1, 2, 1]), classifier) == 0.75


def test_pictures_do_not_depend_on_the_batch_size_and_leave_no_hook():
    pipe = tiny_dit()
    asked = torch.tensor([1, 2, 3])
    drawn = [draw_classes(pipe, asked, num_inference_steps=3, batch_size=size) for size in (1, 2, 3)]
    assert all((drawn[0] - other).abs().max() < 1e-9 for other in drawn[1:])
    plain = pipe([1, 2, 3], num_inference_steps=3, generator=companion.sample_generators(0, range(3)), output_type="pt")
    assert torch.equal(torch.as_tensor(plain.images) * 2 - 1, drawn[2])
    rectified = draw_classes(pipe, asked, num_inference_steps=3, config=RectifiedGuidanceConfig(product="ones"))
    assert (rectified - drawn[2]).abs().max() > 1e-4
