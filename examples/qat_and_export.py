"""Train through the int4 grid, write the file that an Android app loads, and run that very file:

    python examples/qat_and_export.py

Trained in int4 (QAT), nothing is rounded on the way: the file's weights are those that were
trained, bit for bit. The rows are toys. Another model is an argument:
python examples/qat_and_export.py google/gemma-3-270m-it
"""

import sys
import tempfile
from pathlib import Path

import gemma_multi

name = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
rate = 1e-3 if name == "storyteller" else 5e-5
animals = "cat dog hen fox owl bee cow ant pig elk".split()
rows = [{"prompt": f"Word {word}", "completion": f"{word} is a fine word"} for word in animals]

with tempfile.TemporaryDirectory() as work:
    trained = gemma_multi.finetune(
        name, rows, Path(work, "run"), epochs=12, batch_size=5, learning_rate=rate,
        max_length=64, validation=0, qat=True,
    )  # fmt: skip
    path = Path(work) / "fine_words.litertlm"
    report = gemma_multi.export(trained.checkpoint(), path, context_length=512)
    print(f"{path.name}: {report.nbytes / 1e6:.1f} MB of {report.precision}")
    for tensor in report.refitted:
        print(f"  {tensor.name} was refitted, error {tensor.error:.2%}")

    shipped = gemma_multi.load(path)
    print(f"on {shipped.backend}, as on the phone:")
    print("  Word fox ->", shipped.generate("Word fox", temperature=0).text)
    same = shipped.checkpoint.digest() == trained.checkpoint().digest()
    print(f"the same weights, bit for bit: {'yes' if same else 'NO'}")
    print(f"to a phone: adb push {path.name} /data/local/tmp/")
