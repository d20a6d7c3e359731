"""From raw records to an adapter that the build takes: data, fine-tuning, evaluation, pruning, one pipeline.

`stillhouse data prepare`, in the order of its files:
data_recipe.py tables.py                 what is asked for, read and refused by name
readers.py hub_datasets.py records.py    raw records out of files; mapped, checked, read back
intake.py personal.py store.py           into the store, masked; bad ones by file and line
filters.py signatures.py duplicates.py   what is dropped: broken, foreign, there before
contamination.py perplexity.py           leaked, too easy or too odd
synthetic.py endpoint.py                 made up by a model behind an OpenAI-compatible API
screening.py steps.py                    the order of it, with counts
splitting.py balance.py coverage.py      groups into splits, classes, what is thin
writing.py dataset_files.py dataset_card.py data_pictures.py    the dataset's folder
prepare.py data_commands.py              one whole, immutable version or none; the command line
"""
