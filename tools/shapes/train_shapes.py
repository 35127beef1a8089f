"""Train ``shapes``, the packaged vision-language model, on drawings made as it goes.

Usage: ``python tools/shapes/train_shapes.py OUTPUT [--threads 2]``

First the vision tower learns to tell colour, shape, count and place by four linear heads; then
tower, projector and decoder learn to answer questions together. The same seed gives the same
drawings and questions in the same order.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from sequences import Packer, corpus, drawn, pixels, seen_question, word_facts, word_question
from torch import Tensor, nn

from kedit_lightning.data.multimodal.drawing import SIDE, contents, questions

sys.path.append(str(Path(__file__).parents[1] / "nano"))
from vocabulary import train_tokenizer

PATCH, WIDTH, POSITIONS, ENTRIES = 8, 128, 256, 640
TOWER_STEPS, STEPS = 900, 1000
#: One content in five is in no drawing that the model learns from.
HELD_OUT = 5


def split(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Contents to learn from, and contents kept apart."""
    shuffled = contents()
    random.Random(seed).shuffle(shuffled)
    apart = len(shuffled) // HELD_OUT
    return shuffled[apart:], shuffled[:apart]


def build() -> tuple[Any, Any]:
    """The untrained model and its processor."""
    tokenizer = train_tokenizer(corpus(), ENTRIES, POSITIONS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessorPil(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size=side,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config), processor


def features(model: Any, values: Tensor) -> Tensor:
    """Features of patches. Shape ``[n, patches, width]``."""
    return model.model.vision_tower(values).last_hidden_state[:, 1:]  # type: ignore[no-any-return]


def schedule(optimizer: Any, steps: int, start: int = 0) -> Any:
    """A hundred steps up, then a straight line down."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, max(0.02, 1 - (start + step) / steps))
    )


def train_tower(model: Any, known: list[dict[str, str]], steps: int) -> None:
    """Teach the vision tower to tell the attributes."""
    values = questions()["values"]
    heads = nn.ModuleDict({name: nn.Linear(64, len(known)) for name, known in values.items()})
    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    rate, draws, begin = schedule(optimizer, steps), random.Random(1), time.monotonic()
    for step in range(steps):
        shown = [drawn(draws, known) for _ in range(64)]
        shown = [(content, image) for content, image in shown if content is not None]
        mean = features(model, pixels([image for _, image in shown])).mean(1)
        loss, right = torch.zeros(()), {}
        for name, head in heads.items():
            wanted = torch.tensor([values[name].index(content[name]) for content, _ in shown])
            scores = head(mean)
            loss = loss + nn.functional.cross_entropy(scores, wanted)
            right[name] = (scores.argmax(-1) == wanted).float().mean().item()
        _step(loss, parameters, optimizer, rate)
        if step % 100 == 0:
            print(
                f"tower {step} {loss.item():.3f} {right} {time.monotonic() - begin:.0f} s",
                flush=True,
            )


@torch.no_grad()
def right_tokens(model: Any, packer: Packer, apart: list[dict[str, str]]) -> float:
    """Share of answer tokens that are likeliest, about drawings of contents kept apart."""
    draws = random.Random(3)
    shown = [drawn(draws, apart) for _ in range(64)]
    inputs = packer.batch(
        [[seen_question(draws, content) for _ in range(4)] for content, _ in shown]
    )
    labels = inputs.pop("labels")[:, 1:]
    values = pixels([picture for _, picture in shown])
    found = model(**inputs, pixel_values=values, use_cache=False).logits[:, :-1].argmax(-1)
    return float((found == labels)[labels >= 0].float().mean())


def train_all(
    model: Any,
    processor: Any,
    known: list[dict[str, str]],
    apart: list[dict[str, str]],
    steps: int,
    output: Path,
    start: int = 0,
) -> None:
    """Teach the whole model to answer."""
    tokenizer, patches = processor.tokenizer, (SIDE // PATCH) ** 2
    image, line = (
        model.config.image_token_id,
        tokenizer("\n", add_special_tokens=False)["input_ids"],
    )
    bos = tokenizer.bos_token_id
    seen, plain = Packer(tokenizer, [bos, *[image] * patches, *line]), Packer(tokenizer, [bos])
    facts, draws, begin = word_facts(), random.Random(f"answers {start}"), time.monotonic()
    groups = [
        {"params": list(model.model.vision_tower.parameters()), "lr": 3e-4},
        {"params": [p for n, p in model.named_parameters() if "vision_tower" not in n], "lr": 2e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rate = schedule(optimizer, steps, start)
    for step in range(start, steps):
        shown = [drawn(draws, known) for _ in range(16)]
        asked = [[seen_question(draws, content) for _ in range(4)] for content, _ in shown]
        values = pixels([picture for _, picture in shown])
        first = model(**seen.batch(asked), pixel_values=values, use_cache=False).loss
        words = [[word_question(draws, facts) for _ in range(4)] for _ in range(6)]
        second = model(**plain.batch(words), use_cache=False).loss
        _step(first + 0.5 * second, list(model.parameters()), optimizer, rate)
        if step % 50 == 0:
            spent = time.monotonic() - begin
            print(f"all {step} {first.item():.3f} {second.item():.3f} {spent:.0f} s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            print(f"held out: {right_tokens(model, seen, apart):.3f}", flush=True)
            save(model, processor, output)


def _step(loss: Tensor, parameters: Any, optimizer: Any, rate: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    rate.step()


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write a Hugging Face folder with weights in 16 bit."""
    half = transformers.LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config.update(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    half.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", type=Path, help="a folder that an earlier run has saved")
    parser.add_argument("--start", type=int, default=0, help="the step that it was saved at")
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = build()
    print(sum(p.numel() for p in model.parameters()), "parameters")
    known, apart = split()
    if options.resume is None:
        train_tower(model, known, options.tower_steps)
    else:
        kind = transformers.LlavaForConditionalGeneration
        model = kind.from_pretrained(options.resume, dtype="float32").train()
    train_all(model, processor, known, apart, options.steps, options.output, options.start)
    save(model, processor, options.output)


if __name__ == "__main__":
    main()
