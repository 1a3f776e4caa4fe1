"""Train a dual encoder on image-text pairs, noisy ones included, for the other jobs to use.

python jobs/pretrain.py --data pairs/ --encoder ViT-B-32 --pretrained laion2b_s34b_b79k --learning-rate 1e-5
"""

from lpclip.config import PretrainJob
from lpclip.jobs.cli import main


def run(job: PretrainJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.jobs.pretrain import pretrain_job

    pretrain_job(job)


if __name__ == "__main__":
    main(run, PretrainJob)
