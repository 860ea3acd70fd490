"""Load every checkpoint once in a test module, however many commands use it."""

from __future__ import annotations

from typing import Any

import pytest

from llava.eval.jobs import session


def share_models(patch: pytest.MonkeyPatch) -> list[Any]:
    """Make the commands share loaded models; return the list that receives the job of every load."""
    load, models, jobs = session.load_model, {}, []

    def load_once(job: Any) -> Any:
        jobs.append(job)
        key = (str(job.model), job.model_base, job.device, job.dtype, job.tower_dtype, job.anyres)
        key += (job.server is None,)  # else without the decoder
        if key not in models:
            models[key] = load(job)
        return models[key]

    patch.setattr(session, "load_model", load_once)
    return jobs
