"""From a checkpoint and its adapters to proven versions in a Triton repository.

recipe.py checkpoint.py adapter.py     what is asked for, read and refused by name (tables.py, of every room)
hub.py texts.py tasks.py starter.py    where it comes from; held-out text, tasks; a recipe to start from
merge.py export.py quantize.py         the stages that make weights; each runs in a process of its own (worker.py)
loading.py vocabulary.py               a merge's base as transformers loads it; new tokens and tied embeddings
proof.py fp64.py                       what a merge did, in figures; where FP32's rounding is too large for that
tokenizer_files.py                     whose tokenizer a merge has
verify.py answers.py                   how much of the reference is left, and what of it reaches the one who asks
publish.py remove.py                   one whole, immutable version or none
plan.py cache.py pipeline.py           what is to be done, what is kept from last time, the order of it
record.py results.py report.py         what is written down, what people see
progress.py picture.py compare.py      how far it is, how good it is, how two versions differ
commands.py version_commands.py        the command line
"""
