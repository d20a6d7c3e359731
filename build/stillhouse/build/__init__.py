"""From a checkpoint and its adapters to proven versions in a Triton repository.

recipe.py checkpoint.py texts.py       what is asked for, read and refused by name
merge.py export.py quantize.py         the stages that make weights; each runs in a process of its own (worker.py)
verify.py                              how much of the reference is left
publish.py                             one whole, immutable version or none
plan.py cache.py pipeline.py           what is to be done, what is kept from last time, the order of it
record.py report.py                    what is written down, what people see
commands.py                            build, versions and inspect for the command line
"""
