"""One table of URLs and addresses that must lead nowhere, for every test that tries them.

No network is touched here. What is loopback may be tried against a listener of the test's own
(``loopback_urls``); everything else only at the guard, with a resolver and a connector that note
what they were asked and send nothing.
"""

_FORBIDDEN = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1
127.0.0.53 127.1.2.3 127.255.255.254 168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2
172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.170 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1
192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.7 224.0.0.1 239.255.255.250
240.0.0.1 255.255.255.254 255.255.255.255
:: ::1 ::127.0.0.1 ::10.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b::10.0.0.1 64:ff9b::
64:ff9b:1::1 64:ff9b:1::808:808 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1
2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a00:1::1 2002:808:808::1 3ffe::1 3fff::1
4000::1 5f00::1 fc00::1 fd00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700::1%1 fec0::1 ff02::1
ff0e::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""

_PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
168.63.129.15 169.253.255.255 172.15.255.255 172.32.0.1 192.0.1.1 192.167.255.255 198.17.255.255
198.20.0.1 223.255.255.255 2001:200::1 2001:4860:4860::8888 2606:4700:4700::1111 2a00:1450::1
64:ff9b::8.8.8.8
"""

# What a URL parser somewhere reads as an address or as another host.
_OTHER_SCHEMES = """
ftp://h.example/ file:///etc/passwd gopher://h.example:70/_x data:image/png;base64,AAAA
javascript:alert(1) ws://h.example/ dict://h.example:11211/ ldap://h.example/ //h.example/x
h.example/x /etc/passwd http:h.example http:/h.example jar:http://h.example!/
blob:http://h.example/1 httpx://h.example/ unix:/run/docker.sock view-source:http://h.example/
"""
_BAD_HOSTS = """
http:///h.example http:// https:// http://? http://# http://:80/ http://@/ http://./ http://../
http://a..b/ http://.a.example/ http://a.example../ http://-a.example/ http://a-.example/
http://2130706433/ http://0x7f000001/ http://017700000001/ http://0/ http://127.1/
http://127.0.1/ http://0177.0.0.1/ http://0x7f.0.0.1/ http://0x7f.1/ http://127.0.0.0x1/
http://127.0.0.01/ http://127.000.000.001/ http://1.2.3.4.5/ http://256.1.1.1/ http://1.2.3/
http://0x/ http://0X7F.1/ http://a.0x1/ http://a.123/ http://127.0.0.1.1/ http://3232235521/
http://00000177.0.0.1/ http://4294967296/ http://127.0.0.1../
http://user@h.example/ http://user:pw@h.example/ http://h.example@127.0.0.1/
http://h.example:80@127.0.0.1/ http://127.0.0.1@h.example/ http://a@b@c.example/
http://h.example%40127.0.0.1/ http://h%2eexample/ http://%31%32%37.0.0.1/ http://h.example%00/
http://localhost%2f@h.example/ http://127.0.0.1%23.h.example/
http://127。0。0。1/ http://127．0．0．1/ http://127｡0｡0｡1/ http://①②⑦.⓪.⓪.①/ http://h。example/ http://Kelvin.example/
http://ⓛocalhost/ http://local\u00adhost/ http://h.example\u2044x/
http://h.example:0/ http://h.example:65536/ http://h.example:99999/ http://h.example:-1/
http://h.example:+80/ http://h.example:8_0/ http://h.example:80:80/ http://h.example:http/
http://h.example:100000/ http://h.example:٨٠/
http://[::1 http://::1/ http://[::1]x/ http://[]/ http://[::g]/ http://[fe80::1%25eth0]/
http://[fe80::1%eth0]/ http://[::1%lo]/ http://[v1.x]/ http://[127.0.0.1]/ http://[::1]]/
http://h.example[::1]/ http://[[::1]]/ http://[::ffff:127.0.0.1%1]/ http://h_!.example/
http://h.example;x/ http://h,example/ http://<h>/ http://$HOME/ http://*.example/ http://'h'/
"""
_BAD_CHARACTERS = [
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",
    "http://h.example\\@127.0.0.1/",
    "http:\\\\127.0.0.1\\",
    "http://127.0.0.1\\.h.example/",
    " http://h.example/",
    "http://h.example/ ",
    "http://h .example/",
    "http://h.example\t/",
    "http://127.0.\n0.1/",
    "http://h.example/\r\nHost: x",
    "http://h.example\x00.evil/",
    "http://h.example/\x7f",
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 130 + "example/",
    "http://h.example/" + "a" * 9000,
    "http://h.example/\ud800",
]
FORBIDDEN_ADDRESSES = _FORBIDDEN.split()
PUBLIC_ADDRESSES = _PUBLIC.split()
MALFORMED_URLS = {
    "scheme": [*_OTHER_SCHEMES.split(), "", "http", ":", "://h.example"],
    "host": [*_BAD_HOSTS.split(), *_BAD_CHARACTERS],
}
ALL_MALFORMED = [(reason, url) for reason, urls in MALFORMED_URLS.items() for url in urls]

# Each of these some parser, resolver or system takes for this machine.
_LOOPBACK_HOSTS = """
127.0.0.1 127.0.0.1. 127.0.0.2 127.0.0.53 127.1.2.3 127.255.255.254 0.0.0.0 localhost LOCALHOST
localhost. LocalHost. [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1]
[::FFFF:127.0.0.1] [::127.0.0.1] [64:ff9b::127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::]
[::1%lo] [::1%25lo] [::ffff:0:127.0.0.1] [0000:0000:0000:0000:0000:0000:0000:0001]
127.1 127.0.1 2130706433 2130706434 0x7f000001 0X7F000001 017700000001 0177.0.0.1 0x7f.0.0.1 0x7f.1
0177.1 127.0.0.01 127.000.000.001 127.0.0.0x1 0 00 0x0 0.0 00000177.0.0.1 127.0.0.1.. 4294967296
6425673729 user@127.0.0.1 user:pw@127.0.0.1 @127.0.0.1 a@b@127.0.0.1 example.com@127.0.0.1
example.com:80@127.0.0.1 example.com%40127.0.0.1 %31%32%37.0.0.1 127%2e0%2e0%2e1 127.0.0.1%00
localhost%00.example.com 127。0。0。1 127．0．0．1 127｡0｡0｡1 １２７.0.0.1 ①②⑦.⓪.⓪.① ⓛocalhost
localhoſt [::1]] [[::1]] ::1
"""


def loopback_urls(port: int) -> list[str]:
    """Every way known to write this machine with ``port``; some are no sound URLs at all."""
    return [f"http://{host}:{port}/canary?token=s3cret" for host in _LOOPBACK_HOSTS.split()]
