"""What the captions of scenes are written in: the grammar's words, and a tokenizer that knows each as a token."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTextConfig, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from companion.minis.scenes import COLOURS, RELATIONS, SHAPES, TEXTURES

CAPTION_TOKENS = 16  # the longest caption has ten words, and the tokenizer puts a token on either side
WORDS = tuple(
    sorted(
        {"a", "an", "small", "large", *COLOURS, *TEXTURES, *SHAPES, *(word for r in RELATIONS for word in r.split())}
        - {"plain"}  # no caption names it
    )
)

_END = "</w>"


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) learned until each of the words is one token.

    Applied in the order in which they were learned they rebuild every word; rules written word by word would get into
    each other's way ("r e" for "red" before "g r" for "green").
    """
    spelled = [[*word[:-1], word[-1] + _END] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in spelled for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(parts, best) for parts in spelled]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    joined = False  # a part made by this merge takes no part in it again
    for part in parts:
        joined = bool(result) and not joined and (result[-1], part) == pair
        if joined:
            result[-1] += part
        else:
            result.append(part)
    return result


def caption_tokenizer(*, padding_side: str = "right", longest: int = CAPTION_TOKENS) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with a vocabulary of the grammar's words; any other text is spelled in bytes.

    Args:
        padding_side: "right" as Stable Diffusion's, "left" as CogView4's.
        longest: tokens in the longest prompt that its model takes.
    """
    letters = sorted(bytes_to_unicode().values())
    merges = merges_of(WORDS)
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + _END for letter in letters)]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest, padding_side=padding_side)


def text_config(tokenizer: CLIPTokenizer, projection: int) -> CLIPTextConfig:
    """CLIP's text encoder for captions: two layers of width 96, and an embedding of `projection` dimensions."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=4 * 96,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
