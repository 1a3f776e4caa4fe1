"""Label images with a saved probe.

python jobs/predict.py --probe runs/selftrain/probe --data photos/ --out labels.parquet
"""

from lpclip.config import PredictJob
from lpclip.jobs.cli import main


def run(job: PredictJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.jobs.predict import predict_job

    predict_job(job)


if __name__ == "__main__":
    main(run, PredictJob)
