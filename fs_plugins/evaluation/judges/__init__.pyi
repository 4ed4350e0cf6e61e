from .choosing import JUDGES as JUDGES
from .choosing import judge as judge
from .choosing import known_judges as known_judges
from .endpoint import KEY as KEY
from .endpoint import Endpoint as Endpoint
from .exact import ExactMatch as ExactMatch
from .protocol import Judge as Judge
from .similarity import SentenceSimilarity as SentenceSimilarity
