"""`.litertlm`: the bundle that LiteRT-LM loads on Android, iOS, desktops and the web.

Design choices:
- The model inside is the `.tflite` of `exporters.tflite`, with its trailer; the tokenizer is a
  section of its own, as the engine wants it.
- The engine's built-in Gemma 3 template is left as it is (`llm_model_type.gemma3`), with the
  turn markers spelled out for engines that read them from the file. It adds `<bos>` itself.
- Sampling defaults are the checkpoint's. The engine has no greedy sampler; top-p over one word is
  the same thing.
- The bundle says what it can stand. One for CPUs says so, and the engine refuses it on a GPU, where
  int4 in blocks gives nonsense and float32 ends the process. One for GPUs asks for float32
  activations; the engine takes float16 if nobody does, which the graph stands, but no device has
  shown it.
- On a GPU the engine does not wait for one part of a prompt before it sends the next, and from the
  fourth part in a row that takes the same signature it goes wrong (LiteRT-LM 0.18). So a bundle
  for GPUs has sizes enough to read a prompt of 2,000 tokens in fewer.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.exporters.tflite import TfliteOptions, build, choose
from gemma_multi.files import renamed_when_whole
from gemma_multi.progress import Report
from gemma_multi.sampling.options import GenerationOptions
from gemma_multi.sentencepiece_model import with_spoken_steering_pieces

_TOP_P = 2  # SamplerParameters.Type
_ACTIVATIONS = "fp32"  # on a GPU; CPUs have their own way
_GPU_PREFILL = (16, 32, 64, 128, 256, 512)
# The engine reads what a turn adds to the text before it. The line break between turns is at the
# beginning of the later one, because after an answer it has read `<end_of_turn>` and no more; with
# its built-in template the break is lost from the second turn on.
_TEMPLATE = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for part in content -%}{{ part.text | trim }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro given(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system="", first=true) -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}
{%- set ns.system = given(message.content) + "\n\n" -%}
{%- else -%}
{%- if not ns.first -%}{{ "\n" }}{%- endif -%}
{{ "<start_of_turn>" + ("user" if message.role == "user" else "model") + "\n" }}
{{- ns.system + said(message.content) + "<end_of_turn>" -}}
{%- set ns.system = "" -%}
{%- set ns.first = false -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "\n<start_of_turn>model\n" }}{%- endif -%}
"""


def _write(
    checkpoint: Checkpoint, output: Path, options: TfliteOptions, progress: Report
) -> ExportReport:
    try:
        from litert_lm_builder import litertlm_builder
    except ImportError:
        raise BackendError(
            "writing a .litertlm needs litert-lm-builder: pip install 'gemma-multi[litert]'"
        ) from None
    for_gpu = options.target == "gpu"
    if for_gpu:
        info = choose(checkpoint, options)
        if info.precision == "float32":
            raise OptionError(
                "a .litertlm for target 'gpu' would hold float32, on which LiteRT-LM ends the "
                "process there; give precision='int8', or write a .tflite"
            )
        if options.prefill is None:
            sizes = [size for size in _GPU_PREFILL if size <= info.context_length]
            options = replace(options, prefill=sizes)
    sentencepiece = with_spoken_steering_pieces(checkpoint.tokenizer.model)
    built = build(checkpoint, options, tokenizer=sentencepiece, progress=progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as work,
        renamed_when_whole(output) as target,
    ):
        names = ("model.tflite", "tokenizer.model", "metadata.pb", "NOTICE")
        model, tokenizer, facts, notice = (Path(work, name) for name in names)
        with model.open("wb") as file:
            for part in built.parts:
                file.write(part)
        built.parts.clear()
        tokenizer.write_bytes(sentencepiece)
        facts.write_bytes(_metadata(checkpoint, built.info.context_length).SerializeToString())
        notice.write_text(built.provenance.notice(), encoding="utf-8")
        builder = litertlm_builder.LitertLmFileBuilder()
        text = litertlm_builder.DType.STRING
        for key, value in (
            ("Authors", "gemma_multi"),
            ("Source", built.provenance.source),
            ("License", built.provenance.license),
        ):
            builder.add_system_metadata(litertlm_builder.Metadata(key, value, text))
        builder.add_llm_metadata(str(facts))
        builder.add_sentencepiece_tokenizer(str(tokenizer))
        builder.add_tflite_model(
            str(model), litertlm_builder.TfLiteModelType.PREFILL_DECODE,
            backend_constraint=None if for_gpu else "cpu",
            # its own argument for this says so on the terminal
            additional_metadata=[
                litertlm_builder.Metadata("prefer_activation_type", _ACTIVATIONS, text)
            ],
        )  # fmt: skip
        builder.add_generic_binary_data(str(notice))
        with target.open("wb") as file:
            builder.build(file, validate_metadata=True)
            file.flush()
            os.fsync(file.fileno())
    return built.report(output, EXPORTER.format)


def _metadata(checkpoint: Checkpoint, context_length: int) -> Any:
    """What LiteRT-LM must know besides the graph."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    facts, tokenizer = llm_metadata_pb2.LlmMetadata(), checkpoint.tokenizer
    facts.start_token.token_ids.ids.append(tokenizer.bos_id)
    for token in sorted(checkpoint.stop_ids):
        facts.stop_tokens.add().token_ids.ids.append(token)
    facts.max_num_tokens = context_length
    facts.llm_model_type.gemma3.SetInParent()
    turns = facts.prompt_templates
    turns.user.prefix, turns.user.suffix = "<start_of_turn>user\n", "<end_of_turn>\n"
    turns.model.prefix, turns.model.suffix = "<start_of_turn>model\n", "<end_of_turn>\n"
    facts.jinja_prompt_template = _TEMPLATE
    facts.supports_thinking = facts.supports_function_calling = False
    options, sampler = GenerationOptions.merge(checkpoint.generation, {}), facts.sampler_params
    greedy = options.temperature == 0
    sampler.type = _TOP_P
    sampler.k = 1 if greedy else options.top_k or tokenizer.vocab_size
    sampler.p, sampler.temperature = options.top_p, 1.0 if greedy else options.temperature
    return facts


EXPORTER = Exporter(format="litertlm", options=TfliteOptions, write=_write)
