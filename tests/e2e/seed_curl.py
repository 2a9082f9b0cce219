"""The hosted documentation's curl commands for flux-pro-redux, and the picture they name."""

# As printed in the hosted service's documentation of flux-pro-redux.
SUBMIT = """\
curl --location --request POST "https://api.wavespeed.ai/api/v2/wavespeed-ai/flux-pro-redux" \\
--header "Content-Type: application/json" \\
--header "Authorization: Bearer ${WAVESPEED_API_KEY}" \\
--data-raw '{
"image": "https://d2g64w682n9w0w.cloudfront.net/media/images/1745413935078739480_xIVRNKGD.png",
"prompt": "",
"size": "1024*1024",
"seed": 0,
"num_inference_steps": 28,
"guidance_scale": 3.5,
"num_images": 1,
"enable_safety_checker": true
}'
"""
RESULT = """\
curl --location --request GET "https://api.wavespeed.ai/api/v2/wavespeed-ai/flux/${requestId}/result" \\
--header "Authorization: Bearer ${WAVESPEED_API_KEY}"
"""  # noqa: E501
IMAGE = "https://d2g64w682n9w0w.cloudfront.net/media/images/1745413935078739480_xIVRNKGD.png"
