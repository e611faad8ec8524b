"""What lies beside the weights of a directory, for other programs and for people.

Design choices:
- A tokenizer.json that the source had goes along as it is; else it is made from the SentencePiece
  model, for which 262,144 pieces take seconds. Settings that the source's tokenizer_config.json
  makes stand; what it leaves out is added, the chat template most of all.
- generation_config.json names every token that ends an answer: programs that stop at `<eos>` alone
  would go on past `<end_of_turn>`.
- The model card says in its header what hubs ask for, and in its text what Gemma's terms do: where
  the weights come from and what was modified. `NOTICE` and `provenance.json` say it as well.
"""

from __future__ import annotations

from pathlib import Path

from gemma_multi.checkpoint import Checkpoint, Provenance
from gemma_multi.checkpoint.provenance import GEMMA, NOTICE_FILE, PROVENANCE_FILE
from gemma_multi.files import read_optional_json, write_json
from gemma_multi.formats.directory import (
    CARD_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_JSON,
)
from gemma_multi.formats.keras import is_preset
from gemma_multi.hub import is_repository_id
from gemma_multi.tokenizer_json import tokenizer_config, tokenizer_json

# How other programs load a directory, by the name that hubs have for them.
_THEIR_CODE = {
    "transformers": """\
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/directory")
print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])
""",
    "mlx": """\
from mlx_lm import generate, load

model, tokenizer = load("path/to/this/directory")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True
)
print(generate(model, tokenizer, prompt))
""",
    "transformers.js": """\
import { pipeline } from "@huggingface/transformers";

const chat = await pipeline("text-generation", "path/to/this/directory");
console.log(await chat([{ role: "user", content: "Hello" }]));
""",
    "keras-hub": """\
import keras_hub

model = keras_hub.models.Gemma3CausalLM.from_preset("path/to/this/directory")
turn = "<start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n"
print(model.generate(turn, max_length=100))
""",
    "gemma": """\
from gemma import gm

directory = "/path/to/this/directory"
sampler = gm.text.ChatSampler(
    model=gm.nn.Gemma3_270M(),  # the class of these sizes
    params=gm.ckpts.load_params(directory),
    tokenizer=gm.text.Gemma3Tokenizer(f"{directory}/tokenizer.model"),
)
print(sampler.chat("Hello"))
""",
}
_OUR_CODE = """\
import gemma_multi

print(gemma_multi.load("path/to/this/directory").generate("Hello").text)
"""
# which round the embedding scale in bfloat16 alone
_SCALED_IN = ("transformers", "keras-hub", "gemma")
_DUTIES = (
    "Whoever passes these weights on, changed or not, passes on the terms and `NOTICE` with them, "
    "and says what else was modified."
)


def write_tokenizer_json(checkpoint: Checkpoint, directory: Path, context_length: int) -> None:
    """tokenizer.json, and tokenizer_config.json with the chat template. Raises TokenizerError for
    a SentencePiece model that has no such form."""
    source = checkpoint.path
    if source is None or not source.is_dir() or is_preset(source):
        source = directory  # what is read from a file, or from Keras, has nothing to pass on
    tokenizer, template = source / TOKENIZER_JSON, source / CHAT_TEMPLATE_FILE
    if tokenizer.is_file():
        data = tokenizer.read_bytes()
    else:
        data = tokenizer_json(checkpoint.tokenizer.model, checkpoint.config.vocab_size)
    (directory / TOKENIZER_JSON).write_bytes(data)
    settings = tokenizer_config(context_length)
    settings |= read_optional_json(source / TOKENIZER_CONFIG_FILE)
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    write_json(directory / TOKENIZER_CONFIG_FILE, settings)


def write_generation_config(checkpoint: Checkpoint, directory: Path) -> None:
    generation = {**checkpoint.generation, "eos_token_id": sorted(checkpoint.stop_ids)}
    write_json(directory / GENERATION_FILE, generation)


def write_account(
    checkpoint: Checkpoint, provenance: Provenance, directory: Path, library: str, precision: str
) -> None:
    """NOTICE, provenance.json and the model card; `library` is a hub's name for the program that
    the directory is for, `precision` what the weights are stored as there."""
    (directory / PROVENANCE_FILE).write_bytes(provenance.to_json())
    (directory / NOTICE_FILE).write_text(provenance.notice(), encoding="utf-8")
    card = _card(checkpoint, provenance, library, precision)
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def _card(checkpoint: Checkpoint, provenance: Provenance, library: str, precision: str) -> str:
    config, source = checkpoint.config, provenance.source
    hub = is_repository_id(source)
    quantized = precision.startswith("int")
    header = [
        f"license: {provenance.license}",
        *([f"base_model: {source}"] if hub else []),
        *(["base_model_relation: quantized"] if hub and quantized else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("gemma3", "gemma-multi", precision)),
    ]
    where = f"[{source}](https://huggingface.co/{source})" if hub else f"`{source}`"
    revision = f", revision `{provenance.revision}`" if provenance.revision else ""
    changes = [f"- {how}" for how in provenance.modifications] or ["- nothing"]
    gemma = provenance.license == GEMMA
    name = "Gemma Terms of Use" if gemma else "Apache License 2.0"
    size = f"{config.num_parameters / 1e6:.1f} million parameters"
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {source.rsplit('/', 1)[-1]}, {precision}",
        f"A Gemma 3 text model of {size}, stored as {precision}, made from {where}{revision}.",
        "## What was modified",
        "\n".join(changes),
        "## Licence",
        f"[{name}]({provenance.license_link}); see `NOTICE`." + f" {_DUTIES}" * gemma,
        "## Use",
        f"```{'js' if library.endswith('.js') else 'python'}\n{_THEIR_CODE[library]}```",
    ]
    root = config.hidden_size**0.5
    if library in _SCALED_IN and precision == "float32" and config.embedding_scale != root:
        parts.append(
            f"The model was trained with embeddings multiplied by {config.embedding_scale:.6g}, as "
            f"bfloat16 rounds it. In float32 {library} multiplies by {root:.6g}, which moves "
            "logits by some hundredths."
        )
    if library != "transformers.js":  # which are not opened again
        parts += [
            "With [gemma_multi](https://pypi.org/project/gemma-multi/), on MLX, Keras or LiteRT:",
            f"```python\n{_OUR_CODE}```",
        ]
    return "\n\n".join(parts) + "\n"
