from .angular import Angular as Angular
from .certificate import Certificate as Certificate
from .folder import certify_folder as certify_folder
from .folder import pictures_of as pictures_of
from .plan import Plan as Plan
from .prediction import PredictionCertificate as PredictionCertificate
