<?php

// The client and the webhook verifier of wavespeed-ai-bundle, without Symfony's kernel. Its HTTP
// client is kept on this machine.

declare(strict_types=1);

use Errogaht\WaveSpeedAiBundle\Contract\SleeperInterface;
use Errogaht\WaveSpeedAiBundle\Http\ResponseMapper;
use Errogaht\WaveSpeedAiBundle\Http\WaveSpeedClient;
use Errogaht\WaveSpeedAiBundle\Value\GenerationRequest;
use Errogaht\WaveSpeedAiBundle\Webhook\WebhookVerifier;
use Symfony\Component\HttpClient\Exception\TransportException;
use Symfony\Component\HttpClient\HttpClient;
use Symfony\Contracts\HttpClient\HttpClientInterface;
use Symfony\Contracts\HttpClient\ResponseInterface;
use Symfony\Contracts\HttpClient\ResponseStreamInterface;

[, $given, $answer] = $argv;
$job = json_decode(file_get_contents($given), true, 512, JSON_THROW_ON_ERROR);

putenv('PHP_SOURCE='.$job['source']);
require __DIR__.'/php_autoload.php';

final class Stay implements HttpClientInterface
{
    public function __construct(private readonly HttpClientInterface $client)
    {
    }

    public function request(string $method, string $url, array $options = []): ResponseInterface
    {
        $host = (string) parse_url($url, PHP_URL_HOST);
        if ('localhost' !== $host && !str_starts_with($host, '127.')) {
            file_put_contents(getenv('LEFT_LOOPBACK'), "connect $host\n", FILE_APPEND);
            throw new TransportException("$host is not on this machine");
        }

        return $this->client->request($method, $url, $options);
    }

    public function stream($responses, ?float $timeout = null): ResponseStreamInterface
    {
        return $this->client->stream($responses, $timeout);
    }

    public function withOptions(array $options): static
    {
        return new self($this->client->withOptions($options));
    }
}

final class ShortSleeper implements SleeperInterface
{
    public function sleep(float $seconds): void
    {
        usleep(200_000);
    }
}

function client(array $job, string $key): WaveSpeedClient
{
    $config = [
        'api_key' => $key,
        'base_url' => $job['url'].'/api/v3',
        'request_timeout' => 60.0,
        'upload_timeout' => 300.0,
        'polling_timeout' => 120.0,
        'poll_interval' => 2.0,
        'max_poll_interval' => 10.0,
    ];
    $http = new Stay(HttpClient::create());

    return new WaveSpeedClient(
        $http,
        new ResponseMapper(),
        new ShortSleeper(),
        new Psr\Log\NullLogger(),
        $config,
    );
}

function run(WaveSpeedClient $client, array $job, array $changes = []): array
{
    $request = GenerationRequest::create($job['model'], array_merge($job['body'], $changes));

    return $client->wait($client->submit($request)->id)->outputs;
}

function verified(array $job): array
{
    ['body' => $body, 'headers' => $headers, 'secret' => $secret] = $job['webhook'];
    $verifier = new WebhookVerifier($secret);

    return [
        'as sent' => $verifier->verify($body, $headers),
        'other body' => $verifier->verify($body.' ', $headers),
        'other secret' => (new WebhookVerifier('whsec_other'))->verify($body, $headers),
        'late' => $verifier->verify($body, $headers, time() + 3600),
    ];
}

$client = client($job, $job['key']);
$stranger = client($job, 'frs_not-a-key');
$cases = [
    'run' => fn () => run($client, $job),
    'upload' => fn () => run($client, $job, ['image' => $client->upload($job['file'])->url]),
    'models' => fn () => array_map(fn ($model) => $model->id, $client->models()),
    'price' => fn () => $client->price($job['model'], $job['body'])->amount,
    'bad key' => fn () => run($stranger, $job),
    'bad parameter' => fn () => run($client, $job, ['num_images' => 5]),
    'dead URL' => fn () => run($client, $job, ['image' => $job['dead']]),
];
if (isset($job['webhook'])) {
    $cases = ['webhook' => fn () => verified($job)];
}
$answers = [];
foreach ($cases as $name => $call) {
    try {
        $answers[$name] = ['value' => $call()];
    } catch (Throwable $error) {
        $answers[$name] = ['error' => $error->getMessage()];
    }
}
file_put_contents($answer, json_encode($answers, JSON_THROW_ON_ERROR));
