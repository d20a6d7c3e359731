"""Coverage: what a dataset is about, how long its texts are, and what there is little of.

Topics are clusters of prompts: TF-IDF of words, k-means; on a sample where there are many. They are found anew for each
dataset, and mean no more than the words that they are named by.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from stillhouse.tune.data_recipe import Coverage
from stillhouse.tune.records import answer_of, prompt_of
from stillhouse.tune.splitting import SPLITS
from stillhouse.tune.store import Store

_MARKS = (0, 5, 50, 95, 100)
_NAMED_BY = 4


def cover(store: Store, splits: Mapping[int, str], options: Coverage, seed: int) -> dict[str, Any]:
    """Classes, lengths and topics by split, and `thin`: a line each for what there is little of."""
    labels: dict[str, Counter[str]] = {}
    prompts: list[int] = []
    answers: list[int] = []
    sampled = set(random.Random(seed).sample(sorted(splits), min(options.sample, len(splits))))
    texts: dict[int, str] = {}
    for number, record in store.living():
        if "label" in record:
            labels.setdefault(record["label"], Counter())[splits[number]] += 1
        prompt = prompt_of(record)
        prompts.append(len(prompt))
        answers.append(len(answer_of(record)))
        if number in sampled:
            texts[number] = prompt
    topics = _topics(texts, options, seed)
    return {
        "classes": {label: {name: labels[label][name] for name in SPLITS} for label in sorted(labels)},
        "prompt_chars": _marks(prompts),
        "answer_chars": _marks(answers),
        "topics": topics,
        "topics_sample": len(texts),
        "thin": _thin(labels, topics, Counter(splits.values()), options.thin),
    }


def _topics(texts: Mapping[int, str], options: Coverage, seed: int) -> list[dict[str, Any]]:
    """Clusters by size: their share of the sample, the words that set them apart, and the prompt nearest the middle."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    wanted = options.topics or max(2, min(20, round((len(texts) / 4) ** 0.5)))
    numbers, prompts = list(texts), list(texts.values())
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=20_000, stop_words="english", max_df=0.8)
    try:
        matrix = vectorizer.fit_transform(prompts)
    except ValueError:  # nothing is left but stop words
        return []
    distinct = len({row.tobytes() for row in matrix.toarray()}) if len(prompts) <= wanted * 4 else wanted
    clusters = KMeans(min(wanted, distinct), n_init=3, random_state=seed).fit(matrix)
    words = vectorizer.get_feature_names_out()
    distances = clusters.transform(matrix)
    topics = []
    for cluster, size in Counter(clusters.labels_.tolist()).most_common():
        top = np.argsort(-clusters.cluster_centers_[cluster], kind="stable")[:_NAMED_BY]
        own = np.flatnonzero(clusters.labels_ == cluster)
        nearest = own[int(np.argmin(distances[own, cluster]))]
        topics.append(
            {
                "words": [str(words[place]) for place in top],
                "records": size,
                "share": round(size / len(prompts), 4),
                "example": prompts[nearest][:200],
                "record": numbers[nearest],
            }
        )
    return topics


def _thin(
    labels: Mapping[str, Counter[str]], topics: list[dict[str, Any]], sizes: Counter[str], least: int
) -> list[str]:
    lines = [f"{name} has no record" for name in SPLITS if not sizes[name]]
    for label in sorted(labels):
        if (count := labels[label]["train"]) < least:
            lines.append(f"class {label!r} has {count} training records, fewer than {least}")
        absent = [name for name in SPLITS if sizes[name] and not labels[label][name]]
        if absent:
            lines.append(f"class {label!r} is not in {' and '.join(absent)}")
    lines += [
        f"topic {' '.join(topic['words'])!r} has {topic['records']} records, fewer than {least}"
        for topic in topics
        if topic["records"] < least
    ]
    return lines


def _marks(values: list[int]) -> dict[str, float]:
    """Percentiles of `values`, by their names."""
    return {f"p{mark}": float(np.percentile(values, mark)) for mark in _MARKS} if values else {}
