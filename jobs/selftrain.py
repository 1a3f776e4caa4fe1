"""Train a linear probe on unlabelled images, from a CLIP model's own pseudo-labels.

python jobs/selftrain.py --data photos/ --classes cat,dog --encoder ViT-B-32 --pretrained laion2b_s34b_b79k
"""

from lpclip.cli import main
from lpclip.config import SelftrainJob
from lpclip.workflow import selftrain_job

if __name__ == "__main__":
    main(selftrain_job, SelftrainJob)
