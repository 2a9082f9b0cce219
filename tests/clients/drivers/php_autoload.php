<?php

// Finds the classes of the PHP bundle in the checkout PHP_SOURCE, and what they need of Symfony in
// that checkout's vendor folder or, where it has none, in Debian's packages.

declare(strict_types=1);

$source = (string) getenv('PHP_SOURCE');
if (is_file($source.'/vendor/autoload.php')) {
    require_once $source.'/vendor/autoload.php';

    return;
}
$wanted = ['Psr/Log'];
foreach (['Config', 'Console', 'DependencyInjection', 'EventDispatcher', 'HttpClient', 'Mime'] as $name) {
    $wanted[] = 'Symfony/Component/'.$name;
}
foreach ($wanted as $name) {
    $place = '/usr/share/php/'.$name.'/autoload.php';
    if (is_file($place)) {
        require_once $place;
    }
}
spl_autoload_register(static function (string $class) use ($source): void {
    $folders = ['Tests\\' => '/tests/', '' => '/src/'];
    foreach ($folders as $under => $folder) {
        $prefix = 'Errogaht\\WaveSpeedAiBundle\\'.$under;
        if (str_starts_with($class, $prefix)) {
            $name = str_replace('\\', '/', substr($class, strlen($prefix)));
            if (is_file($source.$folder.$name.'.php')) {
                require $source.$folder.$name.'.php';
            }

            return;
        }
    }
});
