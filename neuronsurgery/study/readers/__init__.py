"""Real data sets from disk: Waterbirds, CelebA, the WILDS folders of both, and any folder of images with a table.

A reader looks at tables and files, and stops with one error that lists all that is wrong: nothing is trained on half a
data set. Imports run one way: `pixels` (a file to a tensor), `disk` (what a data set is), `tables` (text to columns),
`assembly` (columns to a data set), `layouts` (the readers); of other packages when a reader is called.
"""

from neuronsurgery.study.data import batches as batches
from neuronsurgery.study.readers.assembly import SPLIT_NAMES as SPLIT_NAMES
from neuronsurgery.study.readers.disk import EXPECTED_COUNTS as EXPECTED_COUNTS
from neuronsurgery.study.readers.disk import ImageData as ImageData
from neuronsurgery.study.readers.disk import Images as Images
from neuronsurgery.study.readers.disk import ImageSplit as ImageSplit
from neuronsurgery.study.readers.disk import Loading as Loading
from neuronsurgery.study.readers.disk import describe_counts as describe_counts
from neuronsurgery.study.readers.disk import digests as digests
from neuronsurgery.study.readers.disk import joined_source as joined_source
from neuronsurgery.study.readers.disk import training_source as training_source
from neuronsurgery.study.readers.layouts import READERS as READERS
from neuronsurgery.study.readers.layouts import celeba as celeba
from neuronsurgery.study.readers.layouts import image_folder as image_folder
from neuronsurgery.study.readers.layouts import waterbirds as waterbirds
from neuronsurgery.study.readers.pixels import IMAGENET_MEAN as IMAGENET_MEAN
from neuronsurgery.study.readers.pixels import IMAGENET_STD as IMAGENET_STD
from neuronsurgery.study.readers.pixels import Framing as Framing
from neuronsurgery.study.readers.pixels import RandomCrop as RandomCrop
from neuronsurgery.study.readers.pixels import evaluation_transform as evaluation_transform
from neuronsurgery.study.readers.pixels import training_transform as training_transform
