from .choosing import JUDGES as JUDGES
from .choosing import judge as judge
from .choosing import known_judges as known_judges
from .endpoint import Endpoint as Endpoint
from .exact import ExactMatch as ExactMatch
from .protocol import Judge as Judge
from .remote import KEY as KEY
from .similarity import SentenceSimilarity as SentenceSimilarity
