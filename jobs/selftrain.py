"""Train a linear probe on unlabelled images, from a CLIP model's own pseudo-labels.

python jobs/selftrain.py --data photos/ --classes cat,dog --encoder ViT-B-32 --pretrained laion2b_s34b_b79k
"""

from lpclip.config import SelftrainJob
from lpclip.jobs.cli import main


def run(job: SelftrainJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.jobs.selftrain import selftrain_job

    selftrain_job(job)


if __name__ == "__main__":
    main(run, SelftrainJob)
