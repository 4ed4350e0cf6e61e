"""The playground: a page on which a picture is attacked, asked about and certified in a browser.

What the page does is here without the page: ``engine.Playground``, of which ``page`` makes one with gradio.
"""
