"""PERFORMANCE C7: greedy answers against transformers' `generate`, the same tokens.

    python tests/bench/generate.py

The "quarter" model at 2x2 of batch.json, one image of 1024 x 1024; decoding alone is the time of
65 tokens less that of one. Then a second question about the same image, to its first token.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import peer  # noqa: E402
from contest import Row, race, ratio, told  # noqa: E402

from nanollava.generate import Assistant, Seen  # noqa: E402
from nanollava.prompts import Turn  # noqa: E402

LONG = 65


def main() -> list[Row]:
    """The rows of C7."""
    with tempfile.TemporaryDirectory() as folder:
        model = peer.bench_model(Path(folder), "2x2").eval()
    other, assistant = peer.peer_of(model), Assistant(model)
    other.generation_config.eos_token_id = None  # neither may stop early: time is per token
    image = Image.effect_noise((1024, 1024), 90).convert("RGB")

    def asked(text: str):
        return model.writer()([Turn("user", f"<image>\n{text}", 1)], [image], answer=True)

    def theirs(room: int, document) -> list[int]:
        return peer.write(other, peer.batch(model, [document], left=True), room)[0]

    def ours(room: int, document) -> list[int]:
        return [token for (token,) in assistant.stream([document], room)]

    first, second = asked("what is it?"), asked("what is beside it?")
    ways = {"peer": theirs, "ours": ours}
    found = {
        room: race(
            {name: lambda way=way, room=room: way(room, first) for name, way in ways.items()}
        )
        for room in (1, LONG)
    }
    decode = {
        name: [b - a for a, b in zip(found[1][name], found[LONG][name], strict=True)]
        for name in ways
    }
    each = {name: 1000 * min(times) / (LONG - 1) for name, times in decode.items()}

    assistant.chat(image, "what is it?", max_new_tokens=1)
    kept = assistant.chat_cache

    def reused() -> list[int]:
        assistant.chat_cache = kept
        list(assistant._speak(Seen(second, model.spec.side**2, (0.0,)), 1))
        return assistant.seen.written

    warm = race(
        {"peer": lambda: theirs(1, second), "ours": lambda: ours(1, second), "reused": reused}
    )
    return [
        Row(
            "C7 decoding, per token",
            ratio(decode, "peer", "ours"),
            "x",
            1.1,
            note=", ".join(f"{name} {ms:.1f} ms" for name, ms in each.items()),
        ),
        Row(
            f"C7 whole answer of {LONG} tokens",
            ratio(found[LONG], "peer", "ours"),
            "x",
            1.05,
            note=told(found[LONG]),
        ),
        Row(
            "C7 second question, first token",
            ratio(warm, "peer", "reused"),
            "x",
            15,
            note=f"{ratio(warm, 'ours', 'reused'):.0f}x against our own first",
        ),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
