"""Serving from Triton: the launcher, and the backend that Triton loads.

tritonserver.py   which tritonserver, its Python backend, the directory and environment that it is given
launcher.py, startup.py   check, start, ask until it answers, end; guard.py is the process between us and the server
leftovers.py      run directories, and what a killed run left behind
backend/model.py  what Triton loads; triton_model.py does its work with tensors.py, answers.py, watch.py, metrics.py
commands.py       `stillhouse serve`
"""
