"""The auxiliary head: what it is asked to read, and from which tokens."""

import pytest
import torch
from torch import nn

from companion.minis.reading import PARAMETERS, WithReader, reading_loss, scene_parameters
from companion.minis.scenes import COLOURS, SHAPES, TEXTURES, scene


def test_readings_are_of_the_scene_as_each_token_sees_it():
    scenes = [scene(3, i, 1) for i in range(4)]
    truth = scene_parameters(scenes)
    perfect = torch.zeros(4, 64, truth.shape[1])
    for i, item in enumerate(s.objects[0] for s in scenes):
        for row in range(8):
            for column in range(8):
                from_here = torch.tensor(item.centre) - torch.tensor([8 * column + 4.0, 8 * row + 4.0])
                perfect[i, 8 * row + column, :2] = from_here / 32
        assert truth[i, 2:4].tolist() == pytest.approx([item.radius / 16, 2 * item.rotation])
        one_of = truth[i, 4:].nonzero().flatten().tolist()
        names = [*TEXTURES, *COLOURS, *SHAPES]
        assert [names[j] for j in one_of] == [item.texture, item.colour, item.shape]
    perfect[..., 2:] = truth[:, None, 2:]
    assert reading_loss(perfect, truth).abs().max() < 1e-12
    perfect[0, 5, 3] += 1.0
    assert reading_loss(perfect, truth)[0] == pytest.approx(1 / (64 * truth.shape[1]))


class Denoiser(nn.Module):
    """Its middle block gives tokens, tokens with others, or a map of features, all holding the same numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.kind = kind

    def forward(self, features: torch.Tensor):
        tokens = features.flatten(2).mT
        shown = {"map": features, "tokens": tokens, "pair": (tokens, -tokens)}[self.kind]
        self.blocks[1](shown)
        return type("Output", (), {"sample": 2 * features})


@pytest.mark.parametrize("kind", ["map", "tokens", "pair"])
def test_tokens_are_read_in_rows_whatever_the_block_gives(kind):
    torch.manual_seed(0)
    features = torch.randn(2, 6, 3, 3)
    model = WithReader(Denoiser(kind), "blocks.1", 6)
    predicted, read = model(features)
    assert torch.equal(predicted, 2 * features) and read.shape == (2, 9, PARAMETERS)
    assert torch.allclose(read[1, 5], model.reader(features[1, :, 1, 2]), atol=1e-6)
    assert not model.denoiser.blocks[1]._forward_hooks  # nothing stays on the network
