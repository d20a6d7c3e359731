"""From raw records to an adapter that the build takes: data, fine-tuning, evaluation, pruning, one pipeline.

revisions.py                             which code comes to a result: numbers that are raised by hand

`stillhouse data prepare`, in the order of its files:
data_recipe.py data_inputs.py            what is asked for, read and refused by name; its hashes
source_files.py raw.py                   which files are read, and what a reader gives out
readers.py json_files.py csv_files.py hub_datasets.py    raw records out of files
records.py kept.py                       mapped, checked, read back
intake.py personal.py store.py           into the store, masked; bad ones by file and line
filters.py duplicates.py                 what is dropped: broken, foreign, there before
own_texts.py sketches.py signatures.py joining.py    by what records are compared, and what is alike joined
measured.py contamination.py perplexity.py    leaked, too easy or too odd
synthetic.py made_up.py endpoint.py journal.py    made up by a model behind an OpenAI-compatible API
screening.py steps.py                    the order of it, with counts
grouping.py splitting.py balance.py coverage.py    groups, into splits, classes, what is thin
writing.py dataset_files.py dataset_card.py data_pictures.py    the dataset's folder
prepare.py data_commands.py              one whole, immutable version or none; the command line

`stillhouse tune`, `evaluate` and `prune`:
settings.py machine.py splits.py encoding.py       what is asked for, on what, from which records, in which tokens
finetune.py training_run.py training.py            a run from recipe to result, its session, the Trainer
observer.py watch.py checkpoints.py                what happens beside it, what its history says, what is kept
card.py replacing.py                               the result, and how it takes an earlier one's place
evaluation_recipe.py                               what is measured by, and the gate
evaluation.py measure.py torch_runner.py stats.py  who is asked, what, by which runner, and what may be chance
measure_cache.py built_versions.py                 what was answered once is kept; which precisions are asked
evaluation_picture.py                              what changed, with its intervals
prune_options.py prune.py importance.py            what is to go, pruning whole, what matters
surgery.py costs.py                                what goes, what that gains
tune_commands.py evaluate_commands.py prune_commands.py quiet.py    the command line

`stillhouse pipeline`, all of it from one recipe:
stages.py                                          the table: command lines, what they read, what they leave
pipeline.py stage_process.py stage_record.py       run where something changed, as child processes, and written down
pipeline_report.py stage_figures.py                one HTML file with every figure and picture
kubeflow.py                                        the same table, compiled for a cluster
pipeline_commands.py                               the command line
"""
