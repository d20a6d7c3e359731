"""Load tests of language models with Locust: users, samples, tables, and runs in a process of their own.

`stillhouse.loadtest.users` is a locustfile's content and imports locust, which patches the process it is imported in;
`stillhouse.loadtest.run` starts it in another one, and imports neither.
"""
