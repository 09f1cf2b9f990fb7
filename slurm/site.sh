# shellcheck shell=bash disable=SC2034
# The settings of slurm/submit.sh. A copy of this file in the folder of a run goes before the suite's own.

# The site's
PARTITION=''                 # required; `sinfo` lists them
ACCOUNT=''                   # where the site asks for one
GPUS=1                       # of each job; 0 works on the CPU
CPUS=4                       # of each job
MEMORY=32G                   # of each job
TIME=12:00:00                # of each job; one that needs more goes on in its next turn
LEAD=600                     # seconds before that limit at which a job is warned: more than an epoch takes, above 60
SETUP='. .venv/bin/activate' # makes python3 ready, in the folder of the run; or 'module load ...'

# The run's
FOLDS=5                      # of the cross-validation, each trained by a job of its own
PARTS=4                      # into which the maps of a fold are divided, each made by a job of its own
METHODS='LRP GGC IG'         # of heatmap.py
TRAIN=''                     # more options of train_cv.py, such as '--model modelB44 --seed 1'
MAPS=''                      # more options of heatmap.py, such as '--baseline controls'
CHECKS=''                    # more options of sanity.py, such as '--scans-per-fold 2'
COMPARE=''                   # more options of overlap.py, such as '--smooth 0 8'
