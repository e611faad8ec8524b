"""From a checkpoint to the file an Android app loads: python examples/ship_to_a_phone.py

Writes a `.litertlm`, runs that very file here, and shows that its weights are the checkpoint's.
Pass another model, such as google/gemma-3-270m-it, as an argument.
"""

import sys
import tempfile
from pathlib import Path

import gemma_multi

name = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
checkpoint = gemma_multi.open_checkpoint(name)
with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / "model.litertlm"
    report = gemma_multi.export(checkpoint, path, context_length=1024, precision="int4")
    print(f"{path.name}: {report.nbytes / 1e6:.1f} MB of {report.precision}")
    for tensor in report.refitted:
        print(f"  {tensor.name} was refitted, error {tensor.error:.2%}")

    shipped = gemma_multi.load(path)
    print(f"\non {shipped.backend}, as on the phone:")
    for piece in shipped.stream("Tell me a bedtime story.\nHero: Luna the owl\nLength: short",
                                temperature=0):  # fmt: skip
        print(piece, end="", flush=True)

    if checkpoint.is_quantized and not report.refitted:
        same = shipped.checkpoint.digest() == checkpoint.digest()
        print(f"\n\nthe same weights, bit for bit: {'yes' if same else 'NO'}")
