"""Serving from Triton: the launcher, and the backend that Triton loads.

launcher.py, startup.py   check, start, ask until it answers, end; guard.py is the process between us and the server
leftovers.py      run directories, and what a killed run left behind
ports.py, repository.py, tritonserver.py   the ports, the models, the server: found and checked
backend/model.py  what Triton loads; triton_model.py and answering.py do its work, in the model's own process, with
                  tensors.py (what is asked), answers.py (what is answered), watch.py, ending.py,
                  under_way.py and metrics.py
serving.py        the whole, until a signal; supervisor.py repairs a model whose process has died
promotion.py      which version is live; control.py asks and tells a running server
openai.py         the gateway before Triton: generating.py, live.py, translating.py
commands.py       `stillhouse serve`, `promote`, `rollback`
"""
