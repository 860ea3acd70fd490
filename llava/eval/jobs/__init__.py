"""Run a job: `job` is decided once, `execute` answers its tasks, `processes` shares them out."""
